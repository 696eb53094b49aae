"""A fine-tuning run as data: a list of stages, each saying which layer groups train, how long, and how fast.

`make_plan` turns the stage specifications of a strategy, or the user's own, into a `Plan`. The trainer executes the
Plan and knows nothing of strategies.

Layer-wise decay is that of ELECTRA, Clark et al. 2020, appendix A, with the difference that the topmost block gets the
full rate (in ELECTRA's code it is the head's rate times decay²).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.fields import HEAD
from hf_transfer.errors import UserError, UserErrors, nearest
from hf_transfer.plan.checks import frozen_entries
from hf_transfer.plan.plan import Group, Plan, Rates, Stage, _rate, matches
from hf_transfer.plan.strategies import STRATEGIES, Spec

LORA_B = r"lora_B|lora_embedding_B"  # in the names of peft's parameters


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
