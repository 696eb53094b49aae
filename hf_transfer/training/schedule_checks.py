"""Learning-rate schedules that cannot do what their keys say in a run of this length.

What no run of this length could mean is refused: a warm-up or a decay that is longer than the run, a lowest learning
rate above the learning rate. What may be meant is noted: a schedule that ends before it gets going.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hf_transfer.config.arguments.schedule import FOLLOW_A_METRIC
from hf_transfer.errors import UserError
from hf_transfer.plan.plan import Plan
from hf_transfer.training.schedules import name_of, run_schedule

_FLOORS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")  # relative to learning_rate, whatever a group's own is
_GREEDY_MIN_LR = 1e-3  # transformers' default
_LOW = 0.5  # fraction of its learning rates that a run should reach


def check(args: Any, plan: Plan, total: int) -> None:
    """Check the schedule against the length of the run, before training.

    Args:
        args: `TransferArguments`.
        plan: resolved to steps.
        total: optimizer steps of the run.

    Raises:
        UserError: the schedule cannot do what its keys say.
    """
    _check_warmup(args, total)
    _check_unfreezing(plan, total)
    _check_decay(args, total)
    _check_lowest(args, plan)


def _check_warmup(args: Any, total: int) -> None:
    if args.warmup_steps >= 1 and int(args.warmup_steps) >= total:
        raise UserError(
            f"a warm-up of {args.warmup_steps:g} steps never reaches the learning rate in a run of {total} optimizer "
            "steps.",
            "Use fewer, or a fraction of all steps such as 0.1.",
            key="warmup_steps",
        )


def _check_unfreezing(plan: Plan, total: int) -> None:
    """A group's warm-up goes on over later stages that train it too."""
    steps = plan.unfreeze_warmup_steps
    for index, stage in enumerate(plan.stages if steps else ()):
        before = set(plan.stages[index - 1].trainable) if index else set[str]()
        for name in (n for n in stage.trainable if n not in before):
            lasts = _trained_until(plan, index, name, total) - (stage.start or 0)
            if lasts <= steps:
                raise UserError(
                    f"a warm-up of {steps} steps never reaches the learning rate of {name!r}, which trains for {lasts} "
                    f"optimizer steps from stage {stage.name!r} on.",
                    f"Use fewer than {lasts}, or longer stages.",
                    key="unfreeze_warmup_steps",
                )


def _trained_until(plan: Plan, index: int, name: str, total: int) -> int:
    later = plan.stages[index + 1 :]
    if plan.waits:  # plateaus decide
        return total
    return next((s.start for s in later if name not in s.trainable and s.start is not None), total)


def _check_decay(args: Any, total: int) -> None:
    kwargs: Mapping[str, Any] = args.lr_scheduler_kwargs or {}
    if name_of(args) != "warmup_stable_decay" or not isinstance(kwargs.get("num_decay_steps"), int):
        return
    warmup, decay, stable = args.get_warmup_steps(total), kwargs["num_decay_steps"], kwargs.get("num_stable_steps")
    parts = [f"{warmup} of warm-up", *([] if stable is None else [f"{stable} stable"]), f"{decay} of decay"]
    steps = warmup + decay + (stable or 0)
    if steps > total or (stable is not None and steps != total):
        raise UserError(
            f"{' and '.join(parts)} make {steps} optimizer steps, and the run has {total}.",
            "Use fewer steps." if steps > total else "Leave num_stable_steps out: what remains is stable.",
            key="lr_scheduler_kwargs",
        )


def _check_lowest(args: Any, plan: Plan) -> None:
    name, kwargs = name_of(args), args.lr_scheduler_kwargs or {}
    highest = args.learning_rate if name in _FLOORS else max(max(s.highest or s.rates) for s in plan.stages)
    if name in (*_FLOORS, *FOLLOW_A_METRIC):
        for rate in _numbers(kwargs.get("min_lr")):
            if rate >= highest:
                raise UserError(
                    f"min_lr: {rate:g} is not below the learning rate of {highest:g}, so that would never fall.",
                    "Use a lower min_lr, or a higher learning_rate.",
                    key="lr_scheduler_kwargs",
                )
    for key in ("min_lr_rate", "min_lr_ratio"):
        for share in _numbers(kwargs.get(key)):
            if not 0 <= share < 1:
                raise UserError(
                    f"{key}: {share:g} is not a fraction of the learning rate, from 0 to below 1.",
                    key="lr_scheduler_kwargs",
                )


def _numbers(value: Any) -> Iterable[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


# ---- notes ---------------------------------------------------------------------------------------------------------


def notes(args: Any, plan: Plan, total: int) -> Iterator[str]:
    """What a schedule does not get to in a run of this length; a sentence each."""
    name, kwargs = name_of(args), args.lr_scheduler_kwargs or {}
    rates = [rate for stage in plan.stages for rate in (stage.highest or stage.rates) if rate]
    if name == "greedy" and "min_lr" not in kwargs and min(rates) <= _GREEDY_MIN_LR:
        yield (
            f"lr_scheduler_type: greedy lowers no learning rate below its min_lr of {_GREEDY_MIN_LR:g}, and this run's "
            f"begin at {min(rates):.2g}; set min_lr in lr_scheduler_kwargs."
        )
    lowest = max(_numbers(kwargs.get("min_lr")), default=0.0)
    if name in FOLLOW_A_METRIC and lowest >= min(rates):
        yield f"min_lr: {lowest:g} is not below the learning rates of all groups; those of {min(rates):.2g} never fall."
    if name == "cosine_warm_restarts" and kwargs["T_0"] >= total - args.get_warmup_steps(total):
        yield f"T_0: {kwargs['T_0']} steps are not shorter than the run, so the learning rate never restarts."
    schedule = run_schedule(args, total)
    if schedule is not None and total:
        highest = max(schedule(step) for step in range(total))
        if highest < _LOW:
            yield (
                f"lr_scheduler_type: in {total} optimizer step{'' if total == 1 else 's'}, {name} reaches only "
                f"{highest:.2g} of the learning rates."
            )
