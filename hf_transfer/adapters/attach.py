"""Attach peft adapters to any model that has layer groups.

The adapted modules follow from the layer groups and the module types, not from a list of architectures: by default
every linear layer and every ungrouped convolution in the blocks that the forward pass calls as a module. (Some models
use the weight of a layer without calling it, so an adapter in it would have no effect.) The head, and every parameter
missing from the checkpoint, is fully trained and saved (`modules_to_save`).

References: LoRA, Hu et al. 2021; DoRA, Liu et al. 2024; rsLoRA, Kalajdzievski 2023; (IA)³, Liu et al. 2022; AdaLoRA,
Zhang et al. 2023; VeRA, Kopiczko et al. 2023; LayerNorm tuning, Zhao et al. 2023; prompt tuning, Lester et al. 2021;
prefix tuning, Li and Liang 2021; bottleneck adapters, Houlsby et al. 2019 and Pfeiffer et al. 2021
(`hf_transfer.adapters.bottleneck`).
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedTokenizerBase

from hf_transfer.adapters.configuration import (
    configuration,
    peft_type,
    refused_if_ignored,
    shown,
    trained_before,
    written,
)
from hf_transfer.adapters.continued import check_same
from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.errors import UserError, listed, one_line
from hf_transfer.layers.forward_pass import REFUSALS, example, forward
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.wrappers import core_of, plain_names

_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")  # prompts that take no positions
VECTORS = re.compile(r"\.(ia3_l|lora_E|lora_magnitude_vector|vera_lambda_[bd])(\.|$)")  # scales: no weight decay


def is_adapted(model: Any) -> bool:
    """Whether `model` has an adapter, i.e. is wrapped by peft."""
    return isinstance(model, PeftModel)


def name_of(keys: AdapterArguments, model: Any) -> str:
    """The name of a run's adapter in `results.json`."""
    if isinstance(keys.adapter, str) and keys.is_adapted:
        return keys.adapter
    return peft_type(model).lower() if is_adapted(model) else "none"


# ---- attaching -----------------------------------------------------------------------------------------------------


def attach(model: Any, keys: AdapterArguments, layer_rules: Sequence[Any] = ()) -> Any:
    """`model` with the adapter selected by `keys`; the model itself if they select none or it already has one.

    Args:
        model: a model, with or without an adapter.
        keys: adapter keys.
        layer_rules: rules of the layer groups, see `layer_groups`. The head's group is trained and saved with the
            adapter.

    Raises:
        UserError: the adapter does not fit the model, matches none of its modules, or differs from the adapter that the
            model already has.
    """
    if is_adapted(model):
        check_same(model, keys)
    elif keys.is_adapted and model is not None:
        groups = layer_groups(model, layer_rules)
        try:
            config = configuration(model, groups, keys)
            frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
            weight = _some_weight(model, config)
            with refused_if_ignored():
                model = get_peft_model(model, config)
        except UserError:
            raise
        except REFUSALS as error:
            raise UserError(
                f"adapter: {shown(keys)} cannot be attached to {type(model).__name__} ({one_line(error)})."
            ) from error
        _check_unchanged(model, weight)
        _keep_frozen(model, frozen)
        if config.is_prompt_learning:
            _check_prompt(model, keys)
    if is_adapted(model):
        _check_saved(model)
    return model


def saved_parameters(model: PeftModel) -> set[str]:
    """Names of the parameters that are saved with the adapter: its own, and the head's."""
    saved = {t.untyped_storage()._cdata for t in get_peft_model_state_dict(model).values()}
    return {name for name, p in model.named_parameters() if p.untyped_storage()._cdata in saved}


def of_backbone(model: Any, names: Sequence[str]) -> list[str]:
    """Those of some trainable parameters that are the backbone's own, not the adapter's: weights that train whole.

    A weight that trains whole in place of a frozen one (LayerNorm tuning, `modules_to_save`) is one of them.
    """
    if not is_adapted(model):
        return list(names)
    plain, (prefix, core) = plain_names(model), core_of(model)
    layers = [f"{prefix}{path}." for path, module in core.named_modules() if isinstance(module, BaseTunerLayer)]
    frozen = {plain[name] for name, p in model.named_parameters() if not p.requires_grad}

    def is_own(name: str) -> bool:
        within = next((layer for layer in layers if name.startswith(layer)), None)
        is_inside = within is not None and not name.startswith(f"{within}base_layer.")
        return not name.startswith(prefix) or (is_inside and plain[name] not in frozen)

    return [name for name in names if not is_own(name)]


def summary(model: PeftModel) -> str:
    """One line on where the adapter is and how many parameters are trainable."""
    names = list(getattr(model.base_model, "targeted_module_names", ()))
    ends = Counter(n.rpartition(".")[2] for n in names)
    place = f"in {len(names)} modules ({', '.join(ends)})" if names else "before the input"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for n, p in model.named_parameters() if ".original_module." not in n)
    count = f"{trainable:,} of {total:,} parameters are trainable ({trainable / total:.2%})"
    kept = trained_before(model)
    more = f" What the earlier adapter trained of the backbone goes on training ({listed(kept, 2)})." if kept else ""
    return f"Adapter {peft_type(model).lower()} {place}: {count}.{more}"


# ---- checks --------------------------------------------------------------------------------------------------------


def _keep_frozen(model: PeftModel, frozen: Sequence[str]) -> None:
    """Keep parameters frozen that the caller froze in the head."""
    plain = plain_names(model)
    for name, parameter in model.named_parameters():
        if plain[name] in frozen:
            parameter.requires_grad_(False)


def _some_weight(model: Any, config: PeftConfig) -> tuple[str, torch.Tensor] | None:
    """(name, a copy of the weight) of a layer in which an adapter begins otherwise than at zero; None without one."""
    if not isinstance(getattr(config, "init_lora_weights", None), str) or not config.target_modules:
        return None
    name = min(config.target_modules)
    return name, model.get_submodule(name).weight.detach().clone()


def _check_unchanged(model: PeftModel, before: tuple[str, torch.Tensor] | None) -> None:
    """Check that an adapter has not moved a part of the backbone's weights into itself (PiSSA, OLoRA, LoftQ).

    Raises:
        UserError: it has: its files would not be those of an adapter on the checkpoint.
    """
    if before is None or before[1].is_meta:
        return
    name, weight = before
    if not torch.equal(model.get_base_model().get_submodule(name).get_base_layer().weight, weight):
        config = model.active_peft_config
        raise UserError(
            f"adapter: init_lora_weights: {config.init_lora_weights!r} changes the weights of the backbone, which are "
            "not saved with the adapter, so the run would fail when it has trained.",
            "Use true, gaussian or orthogonal.",
        )


def _check_saved(model: PeftModel) -> None:
    """Check that every trainable parameter is saved with the adapter.

    Raises:
        UserError: backbone parameters are trainable that would not be saved.
    """
    saved = saved_parameters(model)
    unsaved = [n for n, p in model.named_parameters() if p.requires_grad and p.device.type != "meta" and n not in saved]
    if unsaved and not model.active_peft_config.is_prompt_learning:
        plain = plain_names(model)
        raise UserError(
            f"adapter: {plain[unsaved[0]]} and {len(unsaved) - 1} more backbone parameters are trainable but would not "
            "be saved with the adapter.",
            "Add their modules to the adapter's modules_to_save, or freeze them.",
        )


def _check_prompt(model: PeftModel, keys: AdapterArguments) -> None:
    """Try out whether the model supports a prompt.

    A different prompt must change the logits, and padding must not.

    Raises:
        UserError: the model does not support prompts.
    """
    refusal = "it is not a text model"
    try:
        both = forward(model, padded=True)
        if both is not None:
            batch = example(model, padded=True)
            assert batch is not None
            model.eval()
            with torch.no_grad():
                alone = model(**{k: v[1:, :5] for k, v in batch.items()}).logits
            model.train()
            if not torch.allclose(alone[0], both.logits[1], rtol=1e-3, atol=1e-4):
                refusal = "with a prompt, its logits depend on padding"
            elif torch.equal(both.logits, _with_another_prompt(model).logits):
                refusal = "it ignores the prompt"
            else:
                return
    except REFUSALS as error:
        refusal = _no_prefix(model) or one_line(error).rstrip(".")
    raise UserError(
        f"adapter: {type(model.get_base_model()).__name__} does not support {shown(keys)}: {refusal}.",
        "Use lora, ia3 or another adapter inside the layers.",
    )


def _no_prefix(model: PeftModel) -> str:
    """Why peft cannot prefix-tune this model; empty if it can, or if the adapter is not a prefix."""
    base, argument = model.get_base_model(), "past_key_values"
    accepting = [m for m in (base, base.base_model) if argument in inspect.signature(m.forward).parameters]
    if accepting or peft_type(model) != "PREFIX_TUNING":
        return ""
    return (
        f"peft {version('peft')} passes the prefix as {argument}, which this model does not accept in transformers "
        f"{version('transformers')}"
    )


def _with_another_prompt(model: PeftModel) -> Any:
    """The model's output with a different prompt, which is restored afterwards."""
    prompts = list(model.prompt_encoder.parameters())
    originals = [p.detach().clone() for p in prompts]
    with torch.no_grad():
        for prompt in prompts:
            prompt.add_(1.0).mul_(3.0)
        output = forward(model, padded=True)
        for prompt, original in zip(prompts, originals, strict=True):
            prompt.copy_(original)
    return output


def spare_tokens(keys: AdapterArguments, model: Any) -> int:
    """Number of positions that a prompt takes from the model's maximum length."""
    if is_adapted(model):
        kind, tokens = peft_type(model), getattr(model.active_peft_config, "num_virtual_tokens", 0)
    else:
        own = written(keys) if keys.is_adapted else {}
        kind, tokens = own.get("peft_type", ""), own.get("num_virtual_tokens")
    return 0 if kind in _KEYS_AND_VALUES else int(tokens or 0)


def make_room(processor: Any, keys: AdapterArguments, model: Any) -> None:
    """Shorten the texts that a tokenizer makes by the positions that a prompt takes.

    Args:
        processor: tokenizer or image processor.
        keys: adapter keys.
        model: with or without an adapter.

    Raises:
        UserError: the inputs are images, or no position is left for a text.
    """
    spare = spare_tokens(keys, model)
    if not spare:
        return
    if not isinstance(processor, PreTrainedTokenizerBase):
        raise UserError(
            "a prompt stands before the tokens of a text, and the inputs are images.",
            "Use lora or another adapter.",
            key="adapter",
        )
    whole = processor.model_max_length
    if whole - spare <= processor.num_special_tokens_to_add():
        raise UserError(
            f"the prompt of {spare} tokens leaves no room for a text: the model reads {whole} tokens in all.",
            f"Write {{peft_type: PROMPT_TUNING, num_virtual_tokens: {max(1, whole // 4)}}}, or use another adapter.",
            key="adapter",
        )
    processor.model_max_length = whole - spare
