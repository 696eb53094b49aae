"""What a run chooses for keys that were not given, from its data and its model (`analysis.few_labels`)."""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer.analysis import effort, few_labels, rules
from hf_transfer.analysis.few_labels import Choice, Chosen, Seen
from hf_transfer.analysis.pooling_choice import Candidate, PoolingChoice
from hf_transfer.config.arguments import early_stopping
from hf_transfer.config.arguments.plan import learning_rate_of
from hf_transfer.config.arguments.schedule import WITHOUT_WARMUP
from hf_transfer.data.labels import SINGLE_LABEL
from hf_transfer.errors import UserError
from hf_transfer.layers.frozen import running_statistics
from hf_transfer.models.pooling_layer import PoolingChange
from hf_transfer.runs import choosing_layers, trainings
from hf_transfer.runs.checks import check_batches
from hf_transfer.runs.choosing_layers import BY_HAND, LAST, OWN
from hf_transfer.runs.decisions import recorded
from hf_transfer.runs.expecting import domain_of_head
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.refitting import nothing_to_add
from hf_transfer.runs.room import no_room
from hf_transfer.runs.solvable import (
    ALONE,
    begins,
    has_adapter,
    has_new_head,
    holds,
    holds_weights,
    keeps_head,
    problems_of,
    unsolvable,
)
from hf_transfer.settings import Config

_RATES = ("layer_lr_decay", "layer_lr_multiplier", "layer_learning_rates")
_OF_LENGTH = {"strategy", "head_init", "num_train_epochs"}  # keys that say how long is trained, from which head
_BEFORE = {"pooling": None, "pooling_layer": None}  # of a run by a version that chose nothing
# Schedules that have a warm-up of their own, or none at all.
_WITHOUT_WARMUP = ("one_cycle", "slanted_triangular", *WITHOUT_WARMUP)


def choose(prepared: Prepared, checkpoint: str | None = None, is_one_of_several: bool = False) -> Prepared:
    """Set the keys that were not given, and change what the model's head reads.

    Args:
        prepared: the run; its model is changed in place.
        checkpoint: the folder to resume from, or "auto", if any: the run that wrote it has chosen.
        is_one_of_several: whether the run is compared with others on the validation split.

    Raises:
        UserError: `pooling`, `pooling_layer` or `contrastive_epochs` does not fit the model.
    """
    config = prepared.config
    choosing_layers.check(prepared)
    _check_contrast(prepared)
    state = recorded(checkpoint, Path(str(config.training.output_dir)))
    if state is not None:  # also of a version that chose nothing
        before = state["facts"].get("chosen", _BEFORE)
        if config.finds_rate:  # the run that wrote the checkpoint has found one, or was given it
            before = {"learning_rate": state["facts"]["keys"]["learning_rate"], **before}
        chosen = Chosen({n: Choice(v, "as when the run began") for n, v in before.items() if n not in _given(config)})
        compared = state.get("before_training", {}).get("pooling_candidates", [])  # not of an earlier version
        chosen = replace(chosen, candidates=tuple(Candidate(**one) for one in compared))
    else:
        chosen, found = _chosen(prepared, is_one_of_several)
        chosen = replace(chosen, candidates=found.candidates if found else ())
    config = _with(config, {name: choice.value for name, choice in chosen.keys.items()})
    check_batches(config.training, len(prepared.data.train))
    prepared = replace(prepared, config=config, chosen=chosen)
    if config.model.pooling is None:
        return replace(prepared, frozen=None)
    # A checkpoint holds what the head reads by; further trainings begin where the first did.
    is_resumed = state is not None and not trainings.are_wanted(prepared.config.training)
    prepared, change = choosing_layers.read_chosen(prepared, is_resumed)
    known, keeps_below = prepared.frozen, isinstance(change, PoolingChange)  # another one pools where a layer ends
    prepared = replace(prepared, code_below=known.code if known and keeps_below else None)
    prepared = replace(prepared, frozen=None)  # of the model as it was
    return replace(prepared, chosen=replace(prepared.chosen, change=change))


def _check_contrast(prepared: Prepared) -> None:
    """Raises:
    UserError: `contrastive_epochs` would change what a head reads that was trained before.
    """
    if prepared.config.values["contrastive_epochs"] and keeps_head(prepared):
        raise UserError(
            "the checkpoint's head is kept, and it was trained on the features that this stage would change.",
            "Leave contrastive_epochs out, or begin with a checkpoint without such a head.",
            key="contrastive_epochs",
        )


def _chosen(prepared: Prepared, is_one_of_several: bool) -> tuple[Chosen, PoolingChoice | None]:
    """(what is set, without what was given; the layers that were compared)."""
    config = prepared.config
    values, model = config.values, config.model
    given = _given(config)
    is_auto = values["strategy"] == "auto" and values["stages"] is None
    why_not = ""
    is_wanted = model.pooling in BY_HAND or (model.pooling == "auto" and (is_auto or "pooling" in config.given))
    seen = _seen(prepared, is_one_of_several) if is_auto else None
    chosen = _strategy(prepared, seen) if seen else {}
    if "adapter" in chosen:
        is_wanted, why_not = False, "an adapter is saved without the backbone, whose layers pooling changes"
    if config.training.load_best_model_at_end:
        chosen.pop("save_strategy", None)
    why_unsolved = unsolvable(prepared, **ALONE) if config.data.effort == "quick" else ""
    averages, is_best = _averages(prepared, chosen, is_one_of_several), config.data.effort == "best"
    chosen = effort.choose(config.data.effort, values, given, chosen, why_unsolved, averages and is_best)
    if averages and seen and _decides_length(prepared, chosen):
        chosen |= few_labels.averaged(seen)
    now = _now(config, chosen)
    solves = now["probe_solver"] == "lbfgs"
    fine_tunes = not solves and now["strategy"] != "linear-probe"
    found, why_not = choosing_layers.compare(prepared, fine_tunes) if is_wanted else (None, why_not)
    chosen |= _warm_up(config, chosen, seen)
    chosen |= _rate_of_a_probe(config, chosen)
    why = "early_stopping_patience: the best weights are kept"
    chosen |= {name: Choice(value, why) for name, value in early_stopping.implied(values, config.given).items()}
    if _has_rates(given, values):
        chosen.pop("head_learning_rate", None)
    if model.pooling == "auto":
        chosen |= few_labels.pooling(found, why_not)
        if found is not None and solves and choosing_layers.can_average(prepared, tries=is_best):
            chosen |= effort.averaged(chosen, is_best)
    elif model.pooling in BY_HAND and found is not None:
        chosen["pooling_layer"] = Choice(found.best.group, "the lowest loss in cross-validation")
    elif model.pooling_layer == "auto":
        chosen["pooling_layer"] = Choice(None if model.pooling in OWN else LAST, "")
    kept = {name: values[name] for name, choice in chosen.items() if name in given and values[name] != choice.value}
    own = {name: choice for name, choice in chosen.items() if name not in given}
    rule = str(rules.rule_for(seen)) if seen and _is_of_rule(seen, own) else ""
    return Chosen(own, kept, rule=rule), found


def _is_of_rule(seen: Seen, own: Mapping[str, Choice]) -> bool:
    """Whether the strategy is what the table says, not what `effort` or the checks of given keys made of it."""
    return "strategy" in own and rules.choose(seen)["strategy"] == own["strategy"]


def _given(config: Config) -> frozenset[str]:
    """The keys that were given, without those whose value asks for a choice."""
    asks = {name for name in ("strategy", "pooling", "pooling_layer", "cpu_threads") if config.values[name] == "auto"}
    return config.given - asks - {"effort"}


def _rate_of_a_probe(config: Config, chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    """The default rate of `linear-probe`: that of the run was made for the `auto` that was there before."""
    is_probe = "strategy" in chosen and chosen["strategy"].value == "linear-probe" and "strategy" not in _given(config)
    solver = config.values["probe_solver"] if "probe_solver" not in chosen else chosen["probe_solver"].value
    if not is_probe or solver == "lbfgs" or "learning_rate" in config.given:
        return {}
    return {"learning_rate": Choice(learning_rate_of(None, "linear-probe", None), "the rate of a head alone")}


def _warm_up(config: Config, chosen: Mapping[str, Choice], seen: Seen | None) -> dict[str, Choice]:
    """A warm-up where fine-tuning begins with a trained head, whether that was chosen or given."""
    given, values = _given(config), config.values
    is_solved = _now(config, chosen)["head_init"] == "probe"
    keeps = seen is not None and not seen.is_new_head and "head_learning_rate" in chosen
    schedule = getattr(values["lr_scheduler_type"], "value", values["lr_scheduler_type"])
    adds_up = "num_stable_steps" in (values["lr_scheduler_kwargs"] or {})  # with the other parts of the schedule
    is_refused = schedule in _WITHOUT_WARMUP or adds_up or "unfreeze_warmup_steps" in given
    return few_labels.warm_up(is_solved) if (is_solved or keeps) and not is_refused else {}


def _averages(prepared: Prepared, chosen: Mapping[str, Choice], is_one_of_several: bool) -> bool:
    """Whether several trainings are averaged: there are few examples, and all of the model trains.

    With `effort: best` wherever that is possible, else where it was measured.
    """
    config, now = prepared.config, _now(prepared.config, chosen)
    if now["probe_solver"] == "lbfgs" or now["strategy"] in (None, "linear-probe"):
        return False
    if config.data.effort != "best" and not _decides_length(prepared, chosen):
        return False
    return _can_average(prepared, is_one_of_several)


def _can_average(prepared: Prepared, is_one_of_several: bool) -> bool:
    """Whether several trainings are averaged, if all of the model trains."""
    config = prepared.config
    if is_one_of_several or config.data.streaming or len(prepared.data.train) > few_labels.AVERAGED:
        return False
    if "refit" in _given(config) or config.data.effort == "quick":
        return False
    return not (nothing_to_add(prepared) or trainings.why_not(prepared))


def _decides_length(prepared: Prepared, chosen: Mapping[str, Choice]) -> bool:
    """Whether `auto` decides how long classes are fine-tuned from a head that is solved for."""
    own = chosen.keys() - _given(prepared.config)
    return prepared.loaded.labels.problem_type == SINGLE_LABEL and own >= _OF_LENGTH


def _now(config: Config, chosen: Mapping[str, Choice]) -> dict[str, Any]:
    """Every key with the value that was given, or else was chosen."""
    given = _given(config)
    return {**config.values, **{name: choice.value for name, choice in chosen.items() if name not in given}}


def _strategy(prepared: Prepared, seen: Seen) -> dict[str, Choice]:
    """What `strategy: auto` chooses; the plain strategy where the checks that given keys meet refuse its values."""
    chosen = rules.choose(seen)
    problem = problems_of(_now(prepared.config, chosen))
    return {"strategy": Choice("two-phase", problem)} if problem else chosen


def _seen(prepared: Prepared, is_one_of_several: bool) -> Seen:
    """What the choice of `strategy: auto` depends on."""
    config, data, args = prepared.config, prepared.data, prepared.config.training
    values, given, labels = config.values, config.given, prepared.loaded.labels
    has_classes = labels.problem_type == SINGLE_LABEL
    decides_length = has_classes and not _OF_LENGTH & _given(config) and args.max_steps <= 0
    size = args.per_device_train_batch_size if "per_device_train_batch_size" in given else few_labels.BATCH
    seen = Seen(
        examples=None if config.data.streaming else len(data.train),
        per_class=len(data.train) / len(labels.names) if has_classes else None,
        is_adapted=has_adapter(prepared),
        is_new_head=has_new_head(prepared),
        unsolvable=unsolvable(prepared),
        has_batchnorm=bool(running_statistics(prepared.loaded.model)),
        batch_size=size * args.gradient_accumulation_steps * args.world_size,
        rate=values["learning_rate"] if "learning_rate" in given else None,
        has_steps=args.max_steps > 0,
        not_alone=unsolvable(prepared, **ALONE),
        begins=begins(config),
        holds=holds(config),
        is_random=bool(values["from_scratch"]),
        has_rates=_has_rates(given, values),
        no_room="" if holds_weights(config) else no_room(prepared),  # an adapter freezes what is held
        averages=decides_length and _can_average(prepared, is_one_of_several),
    )
    asks = seen.asks_domain and config.data.effort != "quick"  # which takes the head alone in any case
    return replace(seen, domain=domain_of_head(prepared)) if asks else seen


def _has_rates(given: frozenset[str], values: Mapping[str, Any]) -> bool:
    return any(name in given and values[name] is not None for name in _RATES)


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values of keys."""
    training, model, data = copy.copy(config.training), config.model, config.data
    for name, value in values.items():
        if hasattr(model, name):
            model = replace(model, **{name: value})
        elif hasattr(data, name):
            data = replace(data, **{name: value})
        else:
            kind = type(getattr(training, name))
            setattr(training, name, kind(value) if issubclass(kind, enum.Enum) else value)
    return replace(config, training=training, model=model, data=data, values={**config.values, **values})
