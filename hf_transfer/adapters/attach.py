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

import dataclasses
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from hf_transfer.adapters import bottleneck
from hf_transfer.adapters.targets import narrows, targets
from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.errors import UserError, nearest, one_line, option
from hf_transfer.layers.forward_pass import REFUSALS, called_modules, example, forward
from hf_transfer.layers.groups import LayerGroup, layer_groups
from hf_transfer.layers.wrappers import plain_names

# peft_type of the adapters that are not named after it.
PEFT_TYPES = {"dora": "LORA", "rslora": "LORA", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
VIRTUAL_TOKENS = 20
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
VECTORS = re.compile(r"\.(ia3_l|lora_E|lora_magnitude_vector|vera_lambda_[bd])(\.|$)")  # scales: no weight decay


def is_adapted(model: Any) -> bool:
    """Whether `model` has an adapter, i.e. is wrapped by peft."""
    return isinstance(model, PeftModel)


def peft_type(model: PeftModel) -> str:
    """The peft_type of the active adapter, for example `LORA`."""
    kind = model.active_peft_config.peft_type
    return str(getattr(kind, "value", kind))


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
        _check_same(model, keys)
    elif keys.is_adapted and model is not None:
        groups = layer_groups(model, layer_rules)
        written = _written(keys)
        try:
            config = _config(model, groups, written, keys.lora_target_modules)
            frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own
                model = get_peft_model(model, config)
        except UserError:
            raise
        except REFUSALS as error:
            raise UserError(
                f"adapter: {_shown(keys)} cannot be attached to {type(model).__name__} ({one_line(error)})."
            ) from error
        _keep_frozen(model, frozen)
        if config.is_prompt_learning:
            _check_prompt(model, keys)
    if is_adapted(model):
        _check_saved(model)
    return model


def _written(keys: AdapterArguments) -> dict[str, Any]:
    """peft's configuration for the keys as plain data, without the target modules."""
    if isinstance(keys.adapter, Mapping):
        return {**keys.adapter, "peft_type": str(keys.adapter["peft_type"]).upper()}
    name = str(keys.adapter)
    kind = PEFT_TYPES.get(name, name.upper())
    alpha = 2 * keys.lora_r if keys.lora_alpha is None else keys.lora_alpha
    own: dict[str, Any] = {}
    if kind == "LORA":
        own = {"r": keys.lora_r, "lora_alpha": alpha, "lora_dropout": keys.lora_dropout}
        own |= {"use_dora": name == "dora", "use_rslora": name == "rslora"}
    elif kind == "ADALORA":  # the training loop sets `total_step` once it is known
        own = {"target_r": keys.lora_r, "init_r": -(-3 * keys.lora_r // 2), "lora_alpha": alpha, "total_step": 1}
        own |= {"lora_dropout": keys.lora_dropout}
    elif name in ("prompt", "prefix"):
        own = {"num_virtual_tokens": VIRTUAL_TOKENS}
    return {"peft_type": kind, **own}


def _config(
    model: nn.Module, groups: Sequence[LayerGroup], written: Mapping[str, Any], wanted: Sequence[str] | None
) -> PeftConfig:
    """peft's configuration with target modules and `modules_to_save` filled in from the model."""
    kind = written["peft_type"]
    classes = {str(getattr(k, "value", k)): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in classes:
        raise UserError(f"adapter: peft has no peft_type {kind!r}.{nearest(kind, classes)}")
    cls = classes[kind]
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    for name in written:
        if name not in fields:
            raise UserError(f"adapter: {kind} has no key {name!r}.{nearest(name, fields)}")
    own = {k: v for k, v in written.items() if k != "peft_type"}
    if "modules_to_save" in fields:
        more = own.get("modules_to_save") or []
        own["modules_to_save"] = list(dict.fromkeys([*saved_modules(model, groups), *more]))
    if "target_modules" in fields:
        given = wanted or own.get("target_modules")
        given = [given] if isinstance(given, str) else given
        own["target_modules"] = targets(model, groups, kind, given)
        if kind == "IA3":  # layers that reduce the width scale their input, all others their output
            contracting = [n for n in own["target_modules"] if narrows(model.get_submodule(n))]
            own.setdefault("feedforward_modules", contracting)
        if kind == bottleneck.KIND and not given:
            order = called_modules(model, own["target_modules"]) or own["target_modules"]
            own["target_modules"] = bottleneck.places(model, groups, order, own.get("placement"))
    config = cls(**own)
    if config.is_prompt_learning:
        config.task_type = "SEQ_CLS"  # peft's only model class that adds a prompt to a classifier
    return config


def saved_modules(model: nn.Module, groups: Sequence[LayerGroup]) -> list[str]:
    """The largest modules whose parameters are all in the head's group; they are fully trained and saved.

    Raises:
        UserError: a parameter missing from the checkpoint is in the same module as pretrained ones.
    """
    head = set(groups[-1].parameters)
    modules: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{m}.") for m in modules)
        own = [f"{name}.{n}" for n, _ in module.named_parameters()]
        if name and own and not inside and not isinstance(module, _LISTS) and head.issuperset(own):
            modules.append(name)
    unsaved = [n for n in groups[-1].parameters if not any(n.startswith(f"{m}.") for m in modules)]
    if unsaved:
        raise UserError(
            f"adapter: {', '.join(unsaved[:4])} must train with the head, but shares its module with pretrained "
            "parameters, so it cannot be saved with an adapter.",
            "Train this checkpoint without an adapter, or use a checkpoint that contains the parameter.",
        )
    return modules


def saved_parameters(model: PeftModel) -> set[str]:
    """Names of the parameters that are saved with the adapter: its own, and the head's."""
    saved = {t.untyped_storage()._cdata for t in get_peft_model_state_dict(model).values()}
    return {name for name, p in model.named_parameters() if p.untyped_storage()._cdata in saved}


def summary(model: PeftModel) -> str:
    """One line on where the adapter is and how many parameters are trainable."""
    names = list(getattr(model.base_model, "targeted_module_names", ()))
    ends = Counter(n.rpartition(".")[2] for n in names)
    place = f"in {len(names)} modules ({', '.join(ends)})" if names else "before the input"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for n, p in model.named_parameters() if ".original_module." not in n)
    count = f"{trainable:,} of {total:,} parameters are trainable ({trainable / total:.2%})"
    return f"Adapter {peft_type(model).lower()} {place}: {count}."


# ---- checks --------------------------------------------------------------------------------------------------------


def _shown(keys: AdapterArguments) -> str:
    return str(keys.adapter) if isinstance(keys.adapter, str) else str(dict(keys.adapter or {}))


def _check_same(model: PeftModel, keys: AdapterArguments) -> None:
    """Check that the keys do not ask for an adapter other than the one that the model already has.

    Raises:
        UserError: they do.
    """
    if not keys.is_adapted:
        return
    written, own = _written(keys), peft_type(model)
    config = model.active_peft_config
    other = [k for k, v in written.items() if k != "peft_type" and getattr(config, k, v) != v]
    if own != written["peft_type"] or any(k in ("use_dora", "use_rslora", "r") for k in other):
        raise UserError(
            f"adapter: {_shown(keys)} differs from the adapter in the checkpoint ({own.lower()}"
            + (f" with {', '.join(f'{k}={getattr(config, k)}' for k in other)}" if own == written["peft_type"] else "")
            + ").",
            "Remove the adapter keys to continue training the existing adapter, or start a new one with "
            f"{option('restart_adapter', True)}.",
        )


def _keep_frozen(model: PeftModel, frozen: Sequence[str]) -> None:
    """Keep parameters frozen that the caller froze in the head."""
    plain = plain_names(model)
    for name, parameter in model.named_parameters():
        if plain[name] in frozen:
            parameter.requires_grad_(False)


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
        f"adapter: {type(model.get_base_model()).__name__} does not support {_shown(keys)}: {refusal}.",
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
        config = model.active_peft_config
        return config.num_virtual_tokens if peft_type(model) == "PROMPT_TUNING" else 0
    written = _written(keys) if keys.is_adapted else {}
    return int(written.get("num_virtual_tokens") or 0) if written.get("peft_type") == "PROMPT_TUNING" else 0
