"""Every problem of a plan's keys that shows without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from hf_transfer.config.arguments.adapter import ADAPTERS, AdapterArguments, with_adapter
from hf_transfer.config.arguments.plan import AUTO, PlanArguments
from hf_transfer.config.fields import settings_of, unused, wrong_values
from hf_transfer.errors import nearest, unknown_keys
from hf_transfer.plan.strategies import STRATEGIES

_DECLARED = settings_of(PlanArguments)
_OF_ADAPTERS = settings_of(AdapterArguments)
_OF_STRATEGIES = {name: about for name, about in _DECLARED.items() if name not in _OF_ADAPTERS}
_SPEC_KEYS = ("name", "epochs", "train", "learning_rate", "head_learning_rate", "layer_lr_decay", "layer_lr_multiplier")


def frozen_entries(keys: PlanArguments) -> list[Any]:
    """The entries of `freeze`; a caller in Python may give a single one."""
    return [keys.freeze] if isinstance(keys.freeze, str) else list(keys.freeze or ())


def check(keys: PlanArguments) -> list[str]:
    """Every problem of the plan keys that shows without a model."""
    default = PlanArguments()
    problems = []
    if keys.strategy is not None and keys.strategy not in STRATEGIES:
        problems.append(
            f"strategy: {keys.strategy!r} is not one of {', '.join(STRATEGIES)}." + nearest(keys.strategy, STRATEGIES)
        )
    elif keys.strategy is not None and keys.stages is not None and keys.strategy != "auto":
        problems.append(
            f"strategy and stages contradict each other: stages is a plan of its own, so leave out "
            f"strategy: {keys.strategy}."
        )
    chosen = "stages" if keys.stages is not None else keys.strategy or "full"
    if chosen in (*STRATEGIES, "stages"):
        named = "stages" if chosen == "stages" else f"strategy: {chosen}"
        problems += [
            f"{name}: {getattr(keys, name)!r} has no effect with {named}; it belongs to {' and '.join(readers)}."
            for name, readers in unused(vars(keys), asdict(default), _OF_STRATEGIES, chosen)
        ]
    if keys.layer_lr_decay is not None and keys.layer_lr_multiplier is not None:
        problems.append(
            "layer_lr_decay and layer_lr_multiplier contradict each other: the first counts down from the "
            "head, the second up from the input. Keep one."
        )
    problems += wrong_values(vars(keys), _DECLARED)
    problems += _check_rate(keys)
    problems += _check_trigger(keys)
    problems += _check_adapter(keys)
    problems += _check_groups(keys)
    if keys.batchnorm == "frozen" and keys.strategy == "scratch":
        problems.append(
            "batchnorm: frozen keeps the checkpoint's running statistics, and strategy: scratch, which trains from "
            "random weights, has none; leave it out."
        )
    problems += [f"layer_rules[{i}]: {p}" for i, rule in enumerate(keys.layer_rules or ()) for p in _check_rule(rule)]
    problems += [f"stages[{i}]: {p}" for i, spec in enumerate(keys.stages or ()) for p in _check_spec(spec)]
    if keys.stages is not None and not keys.stages:
        problems.append("stages: the list is empty; give at least one stage, e.g. [{epochs: 3, train: all}].")
    return problems


def _check_rate(keys: PlanArguments) -> Iterable[str]:
    """`learning_rate: auto` finds one factor for all learning rates, so none of them can be given as a number."""
    rate = keys.learning_rate
    if isinstance(rate, str) and rate != AUTO:
        yield f"learning_rate: {rate!r} is not a number. Use one, or auto.{nearest(rate, (AUTO,))}"
    if rate != AUTO:
        return
    given = [name for name in ("head_learning_rate", "layer_learning_rates") if getattr(keys, name) is not None]
    own = ("learning_rate", "head_learning_rate")
    given += [
        f"stages[{i}].{name}"
        for i, spec in enumerate(keys.stages or ())
        for name in own
        if isinstance(spec, Mapping) and spec.get(name) is not None
    ]
    for name in given:
        yield (
            f"learning_rate: auto finds the learning rates of all groups, and {name} gives one; leave it out "
            "(layer_lr_decay and layer_lr_multiplier are ratios and stay), or give learning_rate as a number."
        )


def _check_trigger(keys: PlanArguments) -> Iterable[str]:
    default = PlanArguments()
    plateau = keys.unfreeze_trigger == "plateau"
    idle = ("unfreeze_interval",) if plateau else ("unfreeze_patience", "unfreeze_restore_best")
    for name in idle:
        if keys.strategy == "gradual" and getattr(keys, name) != getattr(default, name):
            yield f"{name}: {getattr(keys, name)!r} has no effect with unfreeze_trigger: {keys.unfreeze_trigger}."


def _check_adapter(keys: PlanArguments) -> Iterable[str]:
    default = PlanArguments()
    chosen = with_adapter(keys.strategy, keys.adapter)
    if isinstance(chosen, Mapping):
        if not isinstance(chosen.get("peft_type"), str):
            yield f"adapter: {dict(chosen)!r} does not say its peft_type, for example {{peft_type: LORA, r: 4}}."
        chosen = "mapping"
    elif chosen not in ADAPTERS:
        yield (
            f"adapter: {chosen!r} is neither one of {', '.join(ADAPTERS)} nor a mapping with a peft_type."
            + nearest(str(chosen), ADAPTERS)
        )
        return
    for name, _ in unused(vars(keys), asdict(default), _OF_ADAPTERS, chosen):
        given = "a mapping, which holds it itself" if chosen == "mapping" else f"adapter: {chosen}"
        yield f"{name}: {getattr(keys, name)!r} has no effect with {given}."
    if chosen != "none" and keys.strategy == "scratch":
        yield "adapter: it belongs to a pretrained backbone, and strategy: scratch has none."


def _check_groups(keys: PlanArguments) -> Iterable[str]:
    if keys.layer_lr_decay is not None and keys.layer_lr_decay > 1:
        yield f"layer_lr_decay: {keys.layer_lr_decay} is over 1, which would train the input fastest; use e.g. 0.75."
    for entry in frozen_entries(keys):
        if not isinstance(entry, str) or not entry:
            yield f"freeze: {entry!r} is not the name of a group, a range such as blocks.0-7, or a pattern."
    for pattern, rate in (keys.layer_learning_rates or {}).items():
        if not isinstance(pattern, str):
            yield f"layer_learning_rates: the pattern {pattern!r} is not a text; write it in quotes."
            continue
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            yield f"layer_learning_rates: the rate of {pattern!r} is {rate!r}, not a number of 0 or more."
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"layer_learning_rates: {pattern!r} is not a regular expression ({error})."


def _check_rule(rule: Any) -> Iterable[str]:
    if not isinstance(rule, list | tuple) or len(rule) != 2:
        yield f"{rule!r} is not a pair of a pattern and a depth, such as ['^embed', stem]."
        return
    pattern, depth = rule
    if not isinstance(pattern, str):
        yield f"the pattern {pattern!r} is not a text."
    is_number = isinstance(depth, int | float) and not isinstance(depth, bool)
    if not (depth is None or isinstance(depth, str) or (is_number and 0 <= depth < math.inf)):
        yield f"the depth {depth!r} is not stem, last, head, next, null, or a number of 0 or more."


def _check_spec(spec: Any) -> Iterable[str]:
    if not isinstance(spec, Mapping):
        yield f"{spec!r} is not a mapping such as {{epochs: 1, train: head}}."
        return
    yield from unknown_keys(spec, _SPEC_KEYS, "a stage")
    train = spec.get("train")
    if train is None:
        yield "train is missing; it is head, all, a number of groups from the top, or a list of group names."
    elif isinstance(train, bool) or not isinstance(train, int | str | list | tuple):
        yield f"train: {train!r} is not head, all, a whole number of groups, or a list of group names."
    for name in ("epochs", "learning_rate", "head_learning_rate", "layer_lr_decay", "layer_lr_multiplier"):
        value = spec.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            yield f"{name}: {value!r} is not a positive number."
        elif name == "layer_lr_decay" and value is not None and value > 1:
            yield f"layer_lr_decay: {value} is over 1, which would train the input fastest; use e.g. 0.75."
    if spec.get("epochs") is None:
        yield "epochs is missing; `stages` sets the run's length."
    if spec.get("layer_lr_decay") is not None and spec.get("layer_lr_multiplier") is not None:
        yield "layer_lr_decay and layer_lr_multiplier contradict each other. Keep one."
