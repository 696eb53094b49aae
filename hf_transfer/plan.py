"""A fine-tuning run as data: a list of stages, each saying which layer groups train, how long, and how fast.

`make_plan` turns the stage specifications of a strategy, or the user's own, into a `Plan`. The trainer executes the
Plan and knows nothing of strategies.

Layer-wise decay is that of ELECTRA, Clark et al. 2020, appendix A, with the difference that the topmost block gets the
full rate (in ELECTRA's code it is the head's rate times decay²).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .errors import UserError, UserErrors, nearest
from .strategies import HEAD, STRATEGIES, PlanArguments, Spec, frozen_entries

LORA_B = r"lora_B|lora_embedding_B"  # in the names of peft's parameters
Rates = tuple[tuple[str, float], ...]  # ordered (pattern, learning rate)


class Group(Protocol):
    """What a plan needs to know of a layer group (`layers.LayerGroup` is one)."""

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
        name: what trains, in words.
        epochs: how long, in epochs of the training set; None where a plateau decides.
        trainable: names of the layer groups that train, input to head.
        rates: learning rate of each of these groups.
        patterns: ordered (pattern, learning rate) rules of the user's over group and parameter names; the first match
            wins, and comes before `rates`.
        roles: ordered (pattern, factor) rules over parameter names: a factor on the group's rate for what a parameter
            does in it, such as LoRA+'s on `lora_B`; `patterns` come before it.
        num_trainable: scalars that train in it.
        start: the optimizer step at which the stage begins, once the plan is resolved; None before it is known.
        highest: for each of these groups the highest rate of its parameters, which is `rates` but for `patterns`.
        patience: the stage ends after so many evaluations without gain; None where `epochs` end it.
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
        """Learning rate of a parameter in this stage; 0.0 where it is frozen."""
        return _rate(self.trainable, self.rates, self.patterns, self.roles, group, parameter)


@dataclass(frozen=True)
class Plan:
    """Stages over named groups. Pure data: comparable, hashable, printable."""

    strategy: str
    groups: tuple[tuple[str, int], ...]  # (name, scalars), input to head
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
        """Whether plateaus end its stages."""
        return any(stage.patience is not None for stage in self.stages)

    def resolve(self, steps_per_epoch: int, max_steps: int | None = None) -> Plan:
        """The same plan with every stage's first optimizer step filled in, without stages that a run of `max_steps`
        does not reach. Where plateaus decide, only the first stage's step is known."""
        if self.waits:
            return replace(self, stages=tuple(replace(s, start=None) for s in self.stages)).begin(0, 0)
        starts: list[int] = []
        epochs = 0.0
        for stage in self.stages:
            first = starts[-1] + 1 if starts else 0  # a stage has a step at least, however short it was asked to be
            starts.append(max(round(epochs * steps_per_epoch), first))
            epochs += stage.epochs or 0.0
        kept = [at for at in starts if max_steps is None or at < max_steps] or starts[:1]
        stages = [replace(s, start=at) for s, at in zip(self.stages, kept, strict=False)]
        left = epochs - sum(s.epochs or 0.0 for s in stages)
        stages[-1] = replace(stages[-1], epochs=(stages[-1].epochs or 0.0) + left) if left else stages[-1]
        return replace(self, stages=tuple(stages))

    def begin(self, index: int, step: int) -> Plan:
        """The same plan with stage `index` beginning at optimizer step `step`."""
        stages = [replace(s, start=step) if i == index else s for i, s in enumerate(self.stages)]
        return replace(self, stages=tuple(stages))

    def at(self, step: int) -> int:
        """Index of the stage that optimizer step `step` (0 for the first) belongs to, in a resolved plan."""
        return max(i for i, stage in enumerate(self.stages) if stage.start is not None and stage.start <= step)

    def trajectory(self, group: str, parameter: str = "") -> tuple[float, ...]:
        """A parameter's learning rate in each stage; 0.0 where it is frozen."""
        return tuple(stage.rate(group, parameter) for stage in self.stages)

    def rate(self, step: int, trajectory: Sequence[float]) -> float:
        """Learning rate at a step of a resolved plan, before the run's own schedule is applied to it."""
        index = self.at(step)
        rate = trajectory[index]
        if not rate or not self.unfreeze_warmup_steps:
            return rate
        thaw = index
        while thaw > 0 and trajectory[thaw - 1] > 0:
            thaw -= 1
        start = self.stages[thaw].start
        assert start is not None, "an unresolved plan has no steps"
        return rate * min(1.0, (step - start) / self.unfreeze_warmup_steps)

    def to_list(self) -> list[dict[str, Any]]:
        """The stages as plain data, as `results.json` holds them."""
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


# ---- from keys to a Plan -------------------------------------------------------------------------------------------


def make_plan(
    config: PlanArguments, groups: Sequence[Group], facts: Any = None, num_train_epochs: float | None = None
) -> Plan:
    """The Plan that `config` asks for over `groups` (input to head, the head last).

    Args:
        config: `PlanArguments` plus `learning_rate` and `num_train_epochs`.
        groups: layer groups of the model.
        facts: what is known of the data; none of today's strategies looks at it.
        num_train_epochs: the run's length where something else than the key sets it (`max_steps`).

    Raises:
        UserError: names or counts of groups that do not exist, patterns that match nothing, a stage in which nothing
            trains.
    """
    backbone = [g.name for g in groups[:-1]]
    strategy = "stages" if config.stages is not None else config.strategy or "full"
    written = config.stages if config.stages is not None else STRATEGIES[strategy](config, backbone)
    specs = [{k: v for k, v in spec.items() if v is not None} for spec in written]
    total = sum(s["epochs"] for s in specs) if config.stages is not None else config.num_train_epochs
    total = num_train_epochs or total
    frozen_groups, frozen_patterns = _frozen(frozen_entries(config), groups)
    written_rates = tuple((config.layer_learning_rates or {}).items())
    _check_patterns(dict(written_rates), groups)
    stages: list[Stage] = []
    # LoRA+, Hayou et al. 2024, section 4: the zero-initialised half of the update learns faster.
    roles: Rates = ((LORA_B, float(config.lora_plus_ratio)),) if config.lora_plus_ratio else ()
    begun, unfreezes = 0.0, 0
    for i, spec in enumerate(specs):
        if total - begun <= 1e-9 * total:  # eight times 0.1 epochs are not quite 0.8
            break  # `never_thawed` says what the epochs did not reach
        last = i == len(specs) - 1
        epochs = total - begun if last else min(float(spec.get("epochs", total)), total - begun)
        waits = any("patience" in s for s in specs)  # then nobody knows before how long a stage lasts
        wanted = _trainable(spec["train"], [g.name for g in groups])
        name = str(spec.get("name") or _stage_name(wanted, backbone))
        by_group = _group_rates(config, spec, backbone)
        patterns: Rates = (*((p, 0.0) for p in frozen_patterns), *((p, float(r)) for p, r in written_rates))
        trainable = tuple(g for g in wanted if g not in frozen_groups)
        moving = _moving(trainable, tuple(by_group[g] for g in trainable), patterns, roles, groups)
        if not moving:
            raise UserError(f"Stage {name!r} trains nothing: every parameter in it is frozen or has rate 0.")
        if stages and set(moving) - set(stages[-1].trainable):
            unfreezes += 1
        factor = config.stage_lr_decay**unfreezes
        stages.append(
            Stage(
                name,
                None if waits else epochs,
                tuple(moving),
                tuple(by_group[g] * factor for g in moving),
                tuple((p, r * factor) for p, r in patterns),
                sum(size for size, _ in moving.values()),
                highest=tuple(rate * factor for _, rate in moving.values()),
                patience=spec.get("patience"),
                roles=roles,
            )
        )
        begun += 0.0 if waits else epochs
    return Plan(
        strategy if strategy != "auto" else "full" if config.is_adapted else "two-phase",
        tuple((g.name, sum(g.sizes)) for g in groups),
        tuple(stages),
        float(total),
        config.unfreeze_warmup_steps,
    )


def _trainable(train: Any, names: list[str]) -> tuple[str, ...]:
    """Group names, input to head, that a stage's `train` means."""
    backbone = names[:-1]
    if train == "all":
        return tuple(names)
    if train == HEAD:
        return (HEAD,)
    if isinstance(train, int) and not isinstance(train, bool):
        if not 0 <= train <= len(backbone):
            raise UserError(
                f"{train} groups cannot be unfrozen: the model has {len(backbone)} below the head.",
                f"They are {', '.join(backbone)}.",
            )
        return tuple(names[len(backbone) - train :])
    wanted = [train] if isinstance(train, str) else list(train)
    for name in wanted:
        if name not in names:
            raise UserError(
                f"There is no layer group {name!r}.", f"The groups are {', '.join(names)}.{nearest(name, names)}"
            )
    return tuple(n for n in names if n in wanted)


def _group_rates(config: PlanArguments, spec: Spec, backbone: list[str]) -> dict[str, float]:
    """The layer-wise conventions: a rate for each group, the head's among them."""
    base = float(spec.get("learning_rate", config.learning_rate))
    decay = spec.get("layer_lr_decay", config.layer_lr_decay)
    multiplier = spec.get("layer_lr_multiplier", config.layer_lr_multiplier)
    if "layer_lr_decay" in spec:
        multiplier = spec.get("layer_lr_multiplier")
    elif "layer_lr_multiplier" in spec:
        decay = None
    n = len(backbone)
    if decay is not None:
        rates, head = [base * decay ** (n - 1 - i) for i in range(n)], base
    elif multiplier is not None:
        rates, head = [base * multiplier**i for i in range(n)], base * multiplier**n
    else:
        rates, head = [base] * n, base
    head = spec.get("head_learning_rate", head if config.head_learning_rate is None else config.head_learning_rate)
    return dict(zip([*backbone, HEAD], map(float, [*rates, head]), strict=True))


def _moving(
    trainable: tuple[str, ...], rates: tuple[float, ...], patterns: Rates, roles: Rates, groups: Sequence[Group]
) -> dict[str, tuple[int, float]]:
    """(scalars that train, the highest rate among them) of each group with any, input to head.

    A group at rate 0, or frozen by the caller, does not train.
    """
    found = {}
    for g in groups:
        free = [
            (size, _rate(trainable, rates, patterns, roles, g.name, parameter))
            for parameter, size, requires_grad in zip(g.parameters, g.sizes, g.requires_grad, strict=True)
            if requires_grad
        ]
        if any(rate > 0 for _, rate in free):
            found[g.name] = (sum(size for size, rate in free if rate > 0), max(rate for _, rate in free))
    return found


def _rate(
    trainable: tuple[str, ...], rates: tuple[float, ...], patterns: Rates, roles: Rates, group: str, parameter: str
) -> float:
    """The first pattern that fits, else the group's own rate, found by its exact name, by the parameter's role."""
    if group not in trainable:
        return 0.0
    own = rates[trainable.index(group)] * next((f for role, f in roles if matches(role, "", parameter)), 1.0)
    return next((rate for pattern, rate in patterns if matches(pattern, group, parameter)), own)


def matches(pattern: str, group: str, parameter: str = "") -> bool:
    """Whether `pattern` is the whole name of the group, or whole dotted parts of the parameter's name.

    `layer.1` is in `encoder.layer.1.output.bias` but not in `encoder.layer.11.output.bias`.
    """
    return bool(re.fullmatch(pattern, group) or (parameter and re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", parameter)))


def _frozen(entries: Sequence[str], groups: Sequence[Group]) -> tuple[set[str], list[str]]:
    """(groups, patterns on parameters) that `freeze` names: a group with what is inside it, a range of groups, or a
    pattern where no group has the name.

    Raises:
        UserErrors: entries that mean nothing.
    """
    names = [g.name for g in groups]
    frozen, patterns, problems = set[str](), [], []
    for entry in entries:
        whole = re.fullmatch(r"(.*?)(\d+)-(\d+)", entry)
        wanted = [f"{whole[1]}{i}" for i in range(int(whole[2]), int(whole[3]) + 1)] if whole else [entry]
        meant = {w: {n for n in names if n == w or n.startswith(f"{w}.")} for w in wanted}
        if (whole and not all(meant.values())) or not meant:
            missing = next((w for w in wanted if not meant[w]), entry)
            problems.append(f"freeze: {entry!r} has no group {missing!r}. The groups are {', '.join(names)}.")
        elif any(meant.values()):
            frozen |= set().union(*meant.values())
        elif _is_pattern(entry) and any(matches(entry, "", p) for g in groups for p in g.parameters):
            patterns.append(entry)
        else:
            problems.append(
                f"freeze: {entry!r} is no group and matches no parameter. The groups are {', '.join(names)}."
                f"{nearest(entry, names)}"
            )
    if problems:
        raise UserErrors(problems)
    return frozen, patterns


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _check_patterns(rates: Mapping[str, float], groups: Sequence[Group]) -> None:
    names = [g.name for g in groups]
    problems = [
        f"layer_learning_rates: the pattern {pattern!r} matches no group and no parameter. "
        f"The groups are {', '.join(names)}.{nearest(pattern, names)}"
        for pattern in rates
        if not any(matches(pattern, g.name, p) for g in groups for p in g.parameters)
    ]
    if problems:
        raise UserErrors(problems)


def _stage_name(trainable: tuple[str, ...], backbone: list[str]) -> str:
    below = [g for g in trainable if g != HEAD]
    if not below:
        return HEAD
    if len(below) == len(backbone):
        return "all groups" if HEAD in trainable else "backbone"
    if HEAD in trainable and below == backbone[-len(below) :]:
        return "top 1 group" if len(below) == 1 else f"top {len(below)} groups"
    return ", ".join(trainable)


# ---- printing ------------------------------------------------------------------------------------------------------


def _table(plan: Plan) -> str:
    total = sum(size for _, size in plan.groups)
    epochs = f"{plan.num_train_epochs:g} epoch{'' if plan.num_train_epochs == 1 else 's'}"
    head = f"Plan: {plan.strategy}, {epochs}, {len(plan.groups) - 1} groups and the head"
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
        return f"until {stage.patience} evaluation{'' if stage.patience == 1 else 's'} without gain"
    return "what is left" if stage.epochs is None else f"{stage.epochs:g}"


def _span(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-2]}, {names[-1]}"


def _rate_span(stage: Stage) -> str:
    rates = [f"{rate:.2g}" for rate in stage.highest or stage.rates]
    body, head = rates[:-1], rates[-1]
    if not body:
        return head
    return f"{body[0]}, {head}" if len(set(body)) == 1 else f"{body[0]} … {body[-1]}, {head}"
