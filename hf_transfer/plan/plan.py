"""The Plan: stages, groups and learning rates as data, independent of models and trainers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

Rates = tuple[tuple[str, float], ...]  # ordered (pattern, learning rate)


class Group(Protocol):
    """What a plan needs to know about a layer group; implemented by `LayerGroup`."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def requires_grad(self) -> tuple[bool, ...]: ...


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Attributes:
        name: description of what trains.
        epochs: length in epochs of the training set; None if a plateau ends the stage.
        trainable: names of the layer groups that train, input to head.
        rates: learning rate of each of these groups.
        patterns: the user's ordered (pattern, learning rate) rules over group and parameter names; the first match
            decides and takes precedence over `rates`.
        num_trainable: number of trainable elements.
        start: optimizer step at which the stage starts; None as long as it is not known.
        highest: highest learning rate within each of these groups, which differs from `rates` only due to `patterns`
            and `roles`.
        patience: number of evaluations without improvement after which the stage ends; None if `epochs` ends it.
        roles: ordered (pattern, factor) rules over parameter names: a factor on the group's learning rate that depends
            on the role of a parameter, such as LoRA+'s for `lora_B`; `patterns` take precedence.
    """

    name: str
    epochs: float | None
    trainable: tuple[str, ...]
    rates: tuple[float, ...]
    patterns: Rates
    num_trainable: int
    start: int | None = None
    highest: tuple[float, ...] = ()
    patience: int | None = None
    roles: Rates = ()

    def rate(self, group: str, parameter: str = "") -> float:
        """Learning rate of a parameter in this stage; 0.0 if it is frozen."""
        return _rate(self.trainable, self.rates, self.patterns, self.roles, group, parameter)


@dataclass(frozen=True)
class Plan:
    """A sequence of stages over named layer groups. Pure data: comparable, hashable, printable.

    Attributes:
        strategy: name of the strategy.
        groups: (name, number of elements) of each layer group, input to head.
        stages: the stages, in order.
        num_train_epochs: length of the run in epochs.
        unfreeze_warmup_steps: optimizer steps over which the learning rate of a newly unfrozen group rises from 0.
    """

    strategy: str
    groups: tuple[tuple[str, int], ...]
    stages: tuple[Stage, ...]
    num_train_epochs: float
    unfreeze_warmup_steps: int = 0

    @property
    def never_thawed(self) -> tuple[str, ...]:
        """Groups that no stage trains."""
        thawed = {g for stage in self.stages for g in stage.trainable}
        return tuple(name for name, _ in self.groups if name not in thawed)

    @property
    def waits(self) -> bool:
        """Whether plateaus end stages."""
        return any(stage.patience is not None for stage in self.stages)

    def resolve(self, steps_per_epoch: int, max_steps: int | None = None) -> Plan:
        """The plan with the first optimizer step of each stage filled in.

        If plateaus end stages, only the first step of the first stage is known.

        Args:
            steps_per_epoch: optimizer steps per epoch.
            max_steps: length of the run in optimizer steps; stages that it does not reach are dropped.
        """
        if self.waits:
            return replace(self, stages=tuple(replace(s, start=None) for s in self.stages)).begin(0, 0)
        starts: list[int] = []
        epochs = 0.0
        for stage in self.stages:
            first = starts[-1] + 1 if starts else 0  # a stage has at least one step
            starts.append(max(round(epochs * steps_per_epoch), first))
            epochs += stage.epochs or 0.0
        kept = [at for at in starts if max_steps is None or at < max_steps] or starts[:1]
        stages = [replace(s, start=at) for s, at in zip(self.stages, kept, strict=False)]
        left = epochs - sum(s.epochs or 0.0 for s in stages)
        stages[-1] = replace(stages[-1], epochs=(stages[-1].epochs or 0.0) + left) if left else stages[-1]
        return replace(self, stages=tuple(stages))

    def begin(self, index: int, step: int) -> Plan:
        """The plan with stage `index` starting at optimizer step `step`."""
        stages = [replace(s, start=step) if i == index else s for i, s in enumerate(self.stages)]
        return replace(self, stages=tuple(stages))

    def at(self, step: int) -> int:
        """Index of the stage that optimizer step `step` (counted from 0) belongs to; requires a resolved plan."""
        return max(i for i, stage in enumerate(self.stages) if stage.start is not None and stage.start <= step)

    def trajectory(self, group: str, parameter: str = "") -> tuple[float, ...]:
        """Learning rate of a parameter in each stage; 0.0 where it is frozen."""
        return tuple(stage.rate(group, parameter) for stage in self.stages)

    def rate(self, step: int, trajectory: Sequence[float]) -> float:
        """Learning rate at an optimizer step, including unfreeze warmup but not the run's learning-rate schedule.

        Args:
            step: optimizer step, counted from 0.
            trajectory: learning rate in each stage, see `trajectory`.
        """
        index = self.at(step)
        rate = trajectory[index]
        if not rate or not self.unfreeze_warmup_steps:
            return rate
        thawed = index
        while thawed > 0 and trajectory[thawed - 1] > 0:
            thawed -= 1
        start = self.stages[thawed].start
        assert start is not None, "an unresolved plan has no steps"
        return rate * min(1.0, (step - start) / self.unfreeze_warmup_steps)

    def to_list(self) -> list[dict[str, Any]]:
        """The stages as plain data, as in `results.json`."""
        return [
            {
                "name": s.name,
                "epochs": s.epochs,
                "groups": list(s.trainable),
                "trainable_parameters": s.num_trainable,
                "learning_rates": dict(zip(s.trainable, s.highest or s.rates, strict=True)),
            }
            for s in self.stages
        ]

    def __str__(self) -> str:
        return _table(self)


def _rate(
    trainable: tuple[str, ...], rates: tuple[float, ...], patterns: Rates, roles: Rates, group: str, parameter: str
) -> float:
    """Learning rate of the first matching pattern, else the group's own times the factor of the parameter's role."""
    if group not in trainable:
        return 0.0
    own = rates[trainable.index(group)] * next((f for role, f in roles if matches(role, "", parameter)), 1.0)
    return next((rate for pattern, rate in patterns if matches(pattern, group, parameter)), own)


def matches(pattern: str, group: str, parameter: str = "") -> bool:
    """Whether `pattern` matches the group's whole name, or whole dotted components of the parameter's name.

    `layer.1` matches `encoder.layer.1.output.bias` but not `encoder.layer.11.output.bias`.
    """
    return bool(re.fullmatch(pattern, group) or (parameter and re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", parameter)))


# ---- printing ------------------------------------------------------------------------------------------------------


def _table(plan: Plan) -> str:
    total = sum(size for _, size in plan.groups)
    epochs = f"{plan.num_train_epochs:g} epoch{'' if plan.num_train_epochs == 1 else 's'}"
    below = len(plan.groups) - 1
    head = f"Plan: {plan.strategy}, {epochs}, {below} group{'' if below == 1 else 's'} and the head"
    rows = [("stage", "epochs", "trains", "parameters", "learning rates, input to head")]
    for i, stage in enumerate(plan.stages):
        size = stage.num_trainable
        share = f"{size:,} ({100 * size / total:.1f}%)" if total else str(size)
        start = "" if stage.start is None else f" from step {stage.start}"
        rows.append(
            (f"{i + 1} {stage.name}", f"{_length(stage)}{start}", _span(stage.trainable), share, _rate_span(stage))
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    notes = [f"Never trained in these epochs: {', '.join(plan.never_thawed)}."] if plan.never_thawed else []
    return "\n".join([head, *lines, *notes])


def _length(stage: Stage) -> str:
    if stage.patience is not None:
        return f"until {stage.patience} evaluation{'' if stage.patience == 1 else 's'} without improvement"
    return "remaining" if stage.epochs is None else f"{stage.epochs:g}"


def _span(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-2]}, {names[-1]}"


def _rate_span(stage: Stage) -> str:
    rates = [f"{rate:.2g}" for rate in stage.highest or stage.rates]
    body, head = rates[:-1], rates[-1]
    if not body:
        return head
    return f"{body[0]}, {head}" if len(set(body)) == 1 else f"{body[0]} … {body[-1]}, {head}"
