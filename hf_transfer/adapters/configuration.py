"""peft's configuration of an adapter, from its keys and the model.

Target modules and `modules_to_save` follow from the layer groups. Options of a mapping that would have no effect here
are refused: an adapter trained without an option that its keys name is another one than was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from hf_transfer.adapters import bottleneck
from hf_transfer.adapters.targets import narrows, targets
from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.errors import UserError, listed, nearest
from hf_transfer.layers.forward_pass import called_modules
from hf_transfer.layers.groups import LayerGroup

# peft_type of the adapters that are not named after it.
PEFT_TYPES = {"dora": "LORA", "rslora": "LORA", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
VIRTUAL_TOKENS = 20
# Options that would have no effect, with what to do instead; with a peft_type, of that kind alone.
_BY_NAME = "The adapted modules are named one by one: select them with target_modules, e.g. '.*layer\\.0\\..*'."
_FROM_MODEL = "It follows from model_name_or_path."
NO_EFFECT = {
    "layers_to_transform": _BY_NAME,
    "layers_pattern": _BY_NAME,
    "base_model_name_or_path": _FROM_MODEL,
    "revision": _FROM_MODEL,
    "auto_mapping": _FROM_MODEL,
    "inference_mode": "An adapter that trains is not in inference mode; remove it.",
    "init_lora_weights: eva": "It needs activations of the data, which a run does not collect; use another one.",
    "alora_invocation_tokens": "peft reads it in causal language models only; remove it.",
    "use_asa: True": "Its subspaces are chosen by calls between the steps, which a run does not make; remove it.",
    "ADALORA.r": "Use init_r and target_r.",
    "ADALORA.total_step": "It is the number of steps of the run; remove it.",
    "ADALORA.rank_pattern": "The run finds it; remove it.",
}
_TRAINED = "trained_by_earlier_adapter"
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def peft_type(model: PeftModel) -> str:
    """The peft_type of the active adapter, for example `LORA`."""
    kind = model.active_peft_config.peft_type
    return str(getattr(kind, "value", kind))


def shown(keys: AdapterArguments) -> str:
    """The adapter of the keys, for a message."""
    return str(keys.adapter) if isinstance(keys.adapter, str) else str(dict(keys.adapter or {}))


def written(keys: AdapterArguments) -> dict[str, Any]:
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
    elif kind == "ADALORA":
        own = {"target_r": keys.lora_r, "init_r": -(-3 * keys.lora_r // 2), "lora_alpha": alpha}
        own |= {"lora_dropout": keys.lora_dropout}
    elif name in ("prompt", "prefix"):
        own = {"num_virtual_tokens": VIRTUAL_TOKENS}
    return {"peft_type": kind, **own}


def configuration(model: nn.Module, groups: Sequence[LayerGroup], keys: AdapterArguments) -> PeftConfig:
    """peft's configuration with target modules and `modules_to_save` filled in from the model.

    Args:
        model: a model without an adapter.
        groups: its layer groups.
        keys: adapter keys.

    Raises:
        UserError: peft has no such adapter, or an option does not exist or would have no effect.
    """
    cls, own = _options(keys)
    kind, fields = written(keys)["peft_type"], {f.name for f in dataclasses.fields(cls) if f.init}
    _keep_trained(model, own, fields, shown(keys))
    if "modules_to_save" in fields:
        more = own.get("modules_to_save") or []
        _check_modules(model, more)
        own["modules_to_save"] = list(dict.fromkeys([*saved_modules(model, groups), *more]))
    if "target_modules" in fields:
        own |= _placed(model, groups, kind, own, keys.lora_target_modules)
    _check_patterns(own)
    with refused_if_ignored():
        config = cls(**own)
    if config.is_prompt_learning:
        config.task_type = "SEQ_CLS"  # peft's only model class that adds a prompt to a classifier
    return config


def _options(keys: AdapterArguments) -> tuple[type[PeftConfig], dict[str, Any]]:
    """(peft's class, its arguments as the keys have them).

    Raises:
        UserError: peft has no such adapter, or an option does not exist or would have no effect.
    """
    own = written(keys)
    kind = own.pop("peft_type")
    classes = {str(getattr(k, "value", k)): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in classes:
        raise UserError(f"adapter: peft has no peft_type {kind!r}.{nearest(kind, classes)}")
    fields = {f.name for f in dataclasses.fields(classes[kind]) if f.init}
    for name, value in own.items():
        if name not in fields:
            raise UserError(f"adapter: {kind} has no key {name!r}.{nearest(name, fields)}")
        reason = NO_EFFECT.get(f"{kind}.{name}") or NO_EFFECT.get(name) or NO_EFFECT.get(f"{name}: {value}")
        if reason and value is not None:
            raise UserError(f"adapter: {name}: {value!r} would have no effect.", reason)
    if (wanted := keys.lora_target_modules) is not None:
        if "target_modules" not in fields:
            raise UserError(f"lora_target_modules: {kind} adapts no modules.", "Remove it.")
        if own.get("target_modules") not in (None, wanted):
            raise UserError(
                f"lora_target_modules: {wanted} contradicts target_modules: {own['target_modules']} in the adapter.",
                "Keep one of them.",
            )
    if kind == "ADALORA":  # the training loop sets it once it is known; peft wants room for a budget phase
        own["total_step"] = int(own.get("tinit") or 0) + int(own.get("tfinal") or 0) + 1
    return classes[kind], own


def _placed(
    model: nn.Module, groups: Sequence[LayerGroup], kind: str, own: Mapping[str, Any], wanted: Sequence[str] | None
) -> dict[str, Any]:
    """The options that say where the adapter goes."""
    given = wanted or own.get("target_modules")
    given = [given] if isinstance(given, str) else given
    names = targets(model, groups, kind, given)
    whole = own.get("modules_to_save") or []
    names = [n for n in names if given or n not in whole]
    placed: dict[str, Any] = {"target_modules": names}
    if kind == "IA3" and own.get("feedforward_modules") is None:
        # layers that reduce the width scale their input, all others their output
        placed["feedforward_modules"] = [n for n in names if narrows(model.get_submodule(n))]
    if kind == bottleneck.KIND and not given:
        order = called_modules(model, names) or names
        placed["target_modules"] = bottleneck.places(model, groups, order, own.get("placement"))
    return placed


# ---- options without effect ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused_if_ignored() -> Iterator[None]:
    """Context in which peft's warning that it ignores an option is an error; other warnings are shown as ever.

    Raises:
        UserError: peft ignores an option.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        said = " ".join(str(one.message).split())
        if re.search(r"\bignored\b", said):
            raise UserError(f"adapter: peft says: {said.rstrip('.')}.", "Remove the option.")
        if "is_gradient_checkpointing" not in said:  # peft's own
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _check_modules(model: nn.Module, wanted: Sequence[str]) -> None:
    """Raises:
    UserError: a name in `modules_to_save` is that of no module; peft would leave it out.
    """
    names = [name for name, _ in model.named_modules() if name]
    for one in [wanted] if isinstance(wanted, str) else wanted:
        if not any(name.endswith(one) for name in names):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise UserError(f"adapter: modules_to_save: the model has no module {one!r}.{nearest(one, ends)}")


def _check_patterns(own: Mapping[str, Any]) -> None:
    """Raises:
    UserError: a pattern for ranks or scales, or of modules to exclude, matches none of the adapted modules.
    """
    adapted = own.get("target_modules") or []
    patterns = [(name, p) for name, value in own.items() if name.endswith("_pattern") for p in value or ()]
    excluded = own.get("exclude_modules") or []
    patterns += [("exclude_modules", p) for p in ([excluded] if isinstance(excluded, str) else excluded)]
    for name, pattern in patterns:
        if not any(_selects(str(pattern), module) for module in adapted):
            raise UserError(
                f"adapter: {name}: {pattern!r} matches none of the {len(adapted)} adapted modules.",
                f"They are {listed(adapted, 4)}.",
            )


def _selects(pattern: str, module: str) -> bool:
    """As peft matches: the whole name, or what follows a dot."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        return False


# ---- what is saved whole ---------------------------------------------------------------------------------------------


def remember_trained(model: nn.Module, names: Iterable[str]) -> None:
    """Note that an earlier adapter trained these parameters of a backbone, so that the next one saves them too."""
    object.__setattr__(model, _TRAINED, tuple(sorted(names)))


def trained_before(model: nn.Module) -> tuple[str, ...]:
    """Plain names of the parameters of a backbone that an earlier adapter trained; see `remember_trained`."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return tuple(getattr(core, _TRAINED, ()))


def _keep_trained(model: nn.Module, own: dict[str, Any], fields: set[str], adapter: str) -> None:
    """Have an adapter save, and so train, what an earlier one trained of the backbone.

    Raises:
        UserError: it cannot.
    """
    names = trained_before(model)
    modules = whole_modules(model, names) if "modules_to_save" in fields else []
    rest = [n for n in names if not any(n.startswith(f"{m}.") for m in modules)]
    if modules:
        own["modules_to_save"] = [*modules, *(own.get("modules_to_save") or [])]
    if rest and all(n.endswith("bias") for n in rest) and "bias" in fields and own.get("bias") in (None, "all"):
        own["bias"], rest = "all", []
    if rest:
        raise UserError(
            f"restart_adapter: the adapter that is replaced trained {listed(rest, 3)} of the backbone, which "
            f"{adapter} would not save.",
            "Merge it first (hf_transfer.merge) and start from the merged model, or use lora, which saves biases.",
        )


def saved_modules(model: nn.Module, groups: Sequence[LayerGroup]) -> list[str]:
    """The largest modules whose parameters are all in the head's group; they are fully trained and saved.

    Raises:
        UserError: a parameter missing from the checkpoint is in the same module as pretrained ones.
    """
    head = groups[-1].parameters
    modules = whole_modules(model, head)
    unsaved = [n for n in head if not any(n.startswith(f"{m}.") for m in modules)]
    if unsaved:
        raise UserError(
            f"adapter: {', '.join(unsaved[:4])} must train with the head, but shares its module with pretrained "
            "parameters, so it cannot be saved with an adapter.",
            "Train this checkpoint without an adapter, or use a checkpoint that contains the parameter.",
        )
    return modules


def whole_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The largest modules all of whose parameters are among `names`."""
    among, modules = set(names), list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{m}.") for m in modules)
        own = [f"{name}.{n}" for n, _ in module.named_parameters()]
        if name and own and not inside and not isinstance(module, _LISTS) and among.issuperset(own):
            modules.append(name)
    return modules
