"""Going on with the adapter of a checkpoint: what its keys may say, and what trains."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.utils import set_additional_trainable_modules
from peft.utils.other import AuxiliaryTrainingWrapper

from hf_transfer.adapters.configuration import peft_type, shown, whole_modules, written
from hf_transfer.adapters.targets import matching
from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.errors import UserError, listed, option
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.wrappers import core_of

_NOT_COMPARED = ("peft_type", "target_modules", "modules_to_save", "feedforward_modules")


def check_same(model: PeftModel, keys: AdapterArguments) -> None:
    """Check that the keys describe the adapter that the model already has, if they describe one.

    Its options cannot change while it goes on, so a key with another value would be recorded and have no effect.

    Raises:
        UserError: they describe another one.
    """
    if not keys.is_adapted:
        return
    wanted, own, config = written(keys), peft_type(model), model.active_peft_config
    if own != wanted["peft_type"]:
        raise _differs(shown(keys), own.lower())
    for name, value in wanted.items():
        has = getattr(config, name, None)
        if name not in _NOT_COMPARED and _plain(has) != _plain(value):
            raise _differs(f"{shown(keys)} with {name}={value}", f"{own.lower()} with {name}={_shown(has)}")
    given = keys.lora_target_modules or wanted.get("target_modules")
    if given:
        _check_targets(model, [given] if isinstance(given, str) else given)
    more = wanted.get("modules_to_save") or ()
    saved = getattr(config, "modules_to_save", None) or ()
    for module in [more] if isinstance(more, str) else more:
        if not any(one.endswith(module) for one in saved):
            raise _differs(f"modules_to_save: {module!r}", f"saves {listed(saved)}")


def _check_targets(model: PeftModel, wanted: Sequence[str]) -> None:
    adapted = getattr(model.base_model, "targeted_module_names", None)
    if adapted is None:
        raise _differs(f"lora_target_modules: {list(wanted)}", f"{peft_type(model).lower()}, which adapts no modules")
    names = [n for n, _ in model.get_base_model().named_modules() if not any(n.startswith(f"{a}.") for a in adapted)]
    if {n for pattern in wanted for n in matching(pattern, names)} != set(adapted):
        ends = listed(dict.fromkeys(n.rpartition(".")[2] for n in adapted))
        raise _differs(f"lora_target_modules: {list(wanted)}", f"in {len(adapted)} modules: {ends}")


def _differs(wanted: str, has: str) -> UserError:
    return UserError(
        f"adapter: {wanted} differs from the adapter in the checkpoint ({has}).",
        "Remove the adapter keys to continue training the existing adapter, or start a new one with "
        f"{option('restart_adapter', True)}.",
    )


def _plain(value: Any) -> Any:
    """A value of a configuration in the form in which it can be compared with what a user writes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, list | tuple | set):
        return sorted(map(str, value))
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def train_head(model: Any, layer_rules: Sequence[Any] = ()) -> None:
    """Have the head train, and be saved, with an adapter that was loaded; nothing for a model without one.

    peft freezes everything around a prompt when it loads one, and an adapter of another program may not contain the
    head, or not all that the checkpoint lacks.

    Args:
        model: as it was loaded.
        layer_rules: rules of the layer groups, see `layer_groups`.
    """
    if not isinstance(model, PeftModel):
        return
    config, adapter = model.active_peft_config, model.active_adapter
    if config.inference_mode:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.enable_adapters(True)
    prefix, core = core_of(model)
    named = dict(model.named_parameters())
    head = layer_groups(model, layer_rules)[-1].parameters
    wrapped = (".modules_to_save.", ".original_module.")
    frozen = [n for n in head if not named[n].requires_grad and not any(w in n for w in wrapped)]
    modules = whole_modules(core, [n.removeprefix(prefix) for n in frozen])
    if not modules or not hasattr(config, "modules_to_save"):
        return
    more = copy.copy(config)
    more.modules_to_save, more.inference_mode = modules, False
    set_additional_trainable_modules(core, more, getattr(core, "config", {}), adapter)
    config.modules_to_save = [*(config.modules_to_save or ()), *modules]
