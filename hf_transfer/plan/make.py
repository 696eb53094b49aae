"""Turn the stage specifications of a strategy, or the user's own, into a `Plan`.

The trainer executes the Plan and knows nothing about strategies.

Layer-wise learning-rate decay follows ELECTRA (Clark et al. 2020, appendix A), except that the topmost block gets the
full learning rate (in ELECTRA's code, the head's learning rate times decay²).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.fields import HEAD
from hf_transfer.errors import UserError, UserErrors, nearest
from hf_transfer.plan.checks import frozen_entries
from hf_transfer.plan.plan import Group, Plan, Rates, Stage, _rate, matches
from hf_transfer.plan.strategies import STRATEGIES, Spec

LORA_B = r"lora_B|lora_embedding_B"  # part of the names of peft's parameters


def make_plan(
    config: PlanArguments, groups: Sequence[Group], facts: Any = None, num_train_epochs: float | None = None
) -> Plan:
    """The Plan that `config` describes.

    Args:
        config: `PlanArguments` plus `learning_rate` and `num_train_epochs`.
        groups: layer groups of the model, input to head.
        facts: facts about the data; not used by any current strategy.
        num_train_epochs: length of the run in epochs, if it is not set by the key (`max_steps`).

    Raises:
        UserError: a group does not exist, there are fewer groups than a stage unfreezes, a pattern matches nothing, or
            a stage has no trainable parameters.
    """
    backbone = [g.name for g in groups[:-1]]
    strategy = "stages" if config.stages is not None else config.strategy or "full"
    written = config.stages if config.stages is not None else STRATEGIES[strategy](config, backbone)
    specs = [{k: v for k, v in spec.items() if v is not None} for spec in written]
    total = sum(s["epochs"] for s in specs) if config.stages is not None else config.num_train_epochs
    total = num_train_epochs or total
    waits = any("patience" in s for s in specs)  # the lengths of the stages are not known in advance
    frozen_groups, frozen_patterns = _frozen(frozen_entries(config), groups)
    written_rates = tuple((config.layer_learning_rates or {}).items())
    _check_patterns(dict(written_rates), groups)
    patterns: Rates = (*((p, 0.0) for p in frozen_patterns), *((p, float(r)) for p, r in written_rates))
    stages: list[Stage] = []
    start, unfreezes = 0.0, 0
    for i, spec in enumerate(specs):
        if total - start <= 1e-9 * total:  # 8 × 0.1 epochs is not exactly 0.8
            break  # `never_thawed` lists the groups that are not reached
        stage = _make_stage(config, spec, groups, frozen_groups, patterns)
        if stages and set(stage.trainable) - set(stages[-1].trainable):
            unfreezes += 1
        last = i == len(specs) - 1
        epochs = total - start if last else min(float(spec.get("epochs", total)), total - start)
        stages.append(replace(_scaled(stage, config.stage_lr_decay**unfreezes), epochs=None if waits else epochs))
        start += 0.0 if waits else epochs
    return Plan(
        strategy if strategy != "auto" else "full" if config.is_adapted else "two-phase",
        tuple((g.name, sum(g.sizes)) for g in groups),
        tuple(stages),
        float(total),
        config.unfreeze_warmup_steps,
    )


def _make_stage(config: PlanArguments, spec: Spec, groups: Sequence[Group], frozen: set[str], patterns: Rates) -> Stage:
    """A stage from its specification, with its length left open.

    Raises:
        UserError: it has no trainable parameters.
    """
    backbone = [g.name for g in groups[:-1]]
    # LoRA+, Hayou et al. 2024, section 4: a higher learning rate for the zero-initialized matrix B.
    roles: Rates = ((LORA_B, float(config.lora_plus_ratio)),) if config.lora_plus_ratio else ()
    wanted = _trainable(spec["train"], [g.name for g in groups])
    name = str(spec.get("name") or _stage_name(wanted, backbone))
    by_group = _group_rates(config, spec, backbone)
    trainable = tuple(g for g in wanted if g not in frozen)
    moving = _moving(trainable, tuple(by_group[g] for g in trainable), patterns, roles, groups)
    if not moving:
        raise UserError(f"Stage {name!r} trains nothing: all its parameters are frozen or have learning rate 0.")
    return Stage(
        name,
        None,
        tuple(moving),
        tuple(by_group[g] for g in moving),
        patterns,
        sum(size for size, _ in moving.values()),
        highest=tuple(rate for _, rate in moving.values()),
        patience=spec.get("patience"),
        roles=roles,
    )


def _scaled(stage: Stage, factor: float) -> Stage:
    """`stage` with all learning rates multiplied by `factor`."""
    return replace(
        stage,
        rates=tuple(rate * factor for rate in stage.rates),
        patterns=tuple((pattern, rate * factor) for pattern, rate in stage.patterns),
        highest=tuple(rate * factor for rate in stage.highest),
    )


def _trainable(train: Any, names: list[str]) -> tuple[str, ...]:
    """Names of the groups that a stage's `train` selects, input to head."""
    backbone = names[:-1]
    if train == "all":
        return tuple(names)
    if train == HEAD:
        return (HEAD,)
    if isinstance(train, int) and not isinstance(train, bool):
        if not 0 <= train <= len(backbone):
            raise UserError(
                f"Cannot unfreeze {train} groups: the model has {len(backbone)} below the head.",
                f"They are {', '.join(backbone)}.",
            )
        return tuple(names[len(backbone) - train :])
    wanted = [train] if isinstance(train, str) else list(train)
    for name in wanted:
        if name not in names:
            raise UserError(
                f"Unknown layer group {name!r}.", f"The groups are {', '.join(names)}.{nearest(name, names)}"
            )
    return tuple(n for n in names if n in wanted)


def _group_rates(config: PlanArguments, spec: Spec, backbone: list[str]) -> dict[str, float]:
    """Learning rate of each group, including the head, by the layer-wise decay or multiplier."""
    base = float(spec.get("learning_rate", config.peak_learning_rate))
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
    """(number of trainable elements, highest learning rate) of each group that trains, input to head.

    A group does not train if its learning rate is 0 or the caller froze all its parameters.
    """
    moving = {}
    for g in groups:
        unfrozen = [
            (size, _rate(trainable, rates, patterns, roles, g.name, parameter))
            for parameter, size, requires_grad in zip(g.parameters, g.sizes, g.requires_grad, strict=True)
            if requires_grad
        ]
        if any(rate > 0 for _, rate in unfrozen):
            moving[g.name] = (sum(size for size, rate in unfrozen if rate > 0), max(rate for _, rate in unfrozen))
    return moving


def _frozen(entries: Sequence[str], groups: Sequence[Group]) -> tuple[set[str], list[str]]:
    """(groups, parameter patterns) that the entries of `freeze` select.

    An entry is a group, including the groups inside it, a range of groups, or a pattern if no group has that name.

    Raises:
        UserErrors: entries that match nothing.
    """
    names = [g.name for g in groups]
    frozen, patterns, problems = set[str](), [], []
    for entry in entries:
        span = re.fullmatch(r"(.*?)(\d+)-(\d+)", entry)
        wanted = [f"{span[1]}{i}" for i in range(int(span[2]), int(span[3]) + 1)] if span else [entry]
        matching = {w: {n for n in names if n == w or n.startswith(f"{w}.")} for w in wanted}
        if (span and not all(matching.values())) or not matching:
            missing = next((w for w in wanted if not matching[w]), entry)
            problems.append(f"freeze: no group {missing!r} in {entry!r}. The groups are {', '.join(names)}.")
        elif any(matching.values()):
            frozen |= set().union(*matching.values())
        elif _is_pattern(entry) and any(matches(entry, "", p) for g in groups for p in g.parameters):
            patterns.append(entry)
        else:
            problems.append(
                f"freeze: {entry!r} matches no group and no parameter. The groups are {', '.join(names)}."
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
        f"layer_learning_rates: pattern {pattern!r} matches no group and no parameter. "
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
