"""Whether a run can begin with the best linear head, or be that head alone, given its keys and its model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.config.arguments.adapter import with_adapter
from hf_transfer.config.arguments.forgetting import PENALTIES
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.groups import LayerGroup, layer_groups
from hf_transfer.layers.head_layers import ends_with_linear, in_order, owners
from hf_transfer.models.heads import MLPSpec
from hf_transfer.plan import checks, probe_checks
from hf_transfer.runs.prepare import Prepared
from hf_transfer.settings import Config

# Keys of a solution from which everything is trained, and of one that stays.
_FIRST = {"strategy": "two-phase", "head_init": "probe", "probe_solver": "sgd"}
ALONE = {"strategy": "linear-probe", "head_init": "random", "probe_solver": "lbfgs", "stages": None}
_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def begins(config: Config) -> str:
    """The given key that asks for the head first and then everything, with its value; empty if there is none."""
    values = config.values
    asks = {
        "head_epochs": True,
        "head_init": values["head_init"] == "probe",
        "contrastive_epochs": values["contrastive_epochs"] > 0,
    }
    return next((f"{name}: {values[name]}" for name in asks if asks[name] and name in config.given), "")


def holds(config: Config) -> str:
    """The given key of a backbone that is to train in another way, with its value; empty if there is none.

    It keeps what the backbone can do, or draws the domains together.
    """
    values = config.values
    names = [*PENALTIES, "replay_dataset_name"]
    if config.data.target_dataset_name is not None and "domain_adaptation" in config.given:
        names.append("domain_adaptation")  # also `none`, one of the models that `auto` compares
    return next((f"{name}: {values[name]}" for name in names if values[name]), "")


def holds_weights(config: Config) -> bool:
    """Whether a given key holds the pretrained weights themselves, which an adapter freezes anyway."""
    return any(config.values[name] > 0 for name in ("l2_sp_alpha", "ewc_lambda"))


def problems_of(values: Mapping[str, Any]) -> str:
    """The first problem of keys that were chosen, by the checks that given ones meet, as part of a sentence."""
    keys: Any = SimpleNamespace(**values)
    problems = [*checks.check(keys), *probe_checks.check(keys), *probe_checks.check_run(values)]
    return problems[0].partition(";")[0].rstrip(".") if problems else ""


def has_adapter(prepared: Prepared) -> bool:
    """Whether an adapter trains."""
    values = prepared.config.values
    return is_adapted(prepared.loaded.model) or with_adapter(values["strategy"], values["adapter"]) != "none"


def has_new_head(prepared: Prepared) -> bool:
    """Whether the head was newly initialized."""
    head = groups_of(prepared)[-1]
    assert head.name == HEAD
    return bool(set(prepared.loaded.fresh) & set(head.parameters))


def keeps_head(prepared: Prepared) -> bool:
    """Whether the head was trained before; random weights have nothing to keep."""
    values = prepared.config.values
    return not (has_new_head(prepared) or values["from_scratch"] or values["strategy"] == "scratch")


def groups_of(prepared: Prepared) -> tuple[LayerGroup, ...]:
    """The layer groups of the model, input to head."""
    return layer_groups(prepared.loaded.model, prepared.config.training.layer_rules or ())


def unsolvable(prepared: Prepared, **wanted: str | None) -> str:
    """Why a run cannot begin with the best linear head, as part of a sentence; empty if it can.

    Args:
        prepared: the run.
        **wanted: values of keys with which it would, other than those of `strategy: auto`.
    """
    config, model = prepared.config, prepared.loaded.model
    if config.values["from_scratch"]:
        return "the weights are random"
    if not wanted and config.values["head_init"] == "random" and "head_init" in config.given:
        return "head_init: random was given"
    if any(os.environ.get(name, "").lower() in ("1", "true") for name in _SHARDED):
        return "FSDP and DeepSpeed shard the model"
    if wanted and has_adapter(prepared):
        return "an adapter would change the features"
    if wanted and (given := begins(config) or holds(config)):
        return f"{given} was given, which asks for more than the head"
    if wanted and "probe_solver" in config.given and config.values["probe_solver"] != wanted["probe_solver"]:
        return f"probe_solver: {config.values['probe_solver']} was given"
    if problem := problems_of({**config.values, **(wanted or _FIRST)}):
        return problem
    if MLPSpec.of(model.config) is not None:
        return "it is an MLP"
    if not ends_with_linear(model, owners(in_order(model, groups_of(prepared)[-1].parameters))):
        return "the head does not end with one linear layer"
    return ""
