"""Look through the wrappers of a model: peft's, and transformers' wrapper around timm models."""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import nn

_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|ln_tuning_layers\.[^.]+)(?=\.|$)")


def plain_names(model: nn.Module) -> dict[str, str]:
    """Parameter name → its name without peft's wrappers; an adapter's parameters are named after their host layer.

    For example, `base_model.model.bert.pooler.modules_to_save.default.dense.weight` becomes
    `bert.pooler.dense.weight`.
    """
    prefix, core = core_of(model)
    if core is model:
        return {n: n for n, _ in model.named_parameters()}
    return {n: plain_name(n, prefix) for n, _ in model.named_parameters()}


def plain_name(name: str, prefix: str) -> str:
    """The name of a parameter or module without peft's wrappers; `prefix` is that of `core_of`."""
    return _WRAPPED.sub("", name.removeprefix(prefix)) if prefix else name


def core_of(model: nn.Module) -> tuple[str, nn.Module]:
    """(name prefix, the module inside any peft wrapper)."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        core = model.get_base_model()
        prefix = next(name for name, module in model.named_modules() if module is core)
        return f"{prefix}.", core
    return "", model


def pretrained(core: nn.Module) -> Any:
    """`core` if it is a `transformers.PreTrainedModel`, else None."""
    transformers = sys.modules.get("transformers")
    return core if transformers is not None and isinstance(core, transformers.PreTrainedModel) else None


def timm_core(core: nn.Module) -> tuple[str, Any]:
    """(name prefix, the timm model) of a timm model or transformers' wrapper around one; ("", None) for others."""
    model = pretrained(core)
    if model is not None:
        return ("timm_model.", model.timm_model) if model.config.model_type == "timm_wrapper" else ("", None)
    is_timm = "timm" in sys.modules and type(core).__module__.startswith("timm.")
    return "", core if is_timm or hasattr(core, "group_matcher") else None
