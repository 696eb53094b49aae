"""Which of two evaluations is better, and whether the evaluations of a run can say so.

`metric_for_best_model` decides it for the best checkpoint, plateaus, early stopping and schedules that follow a metric.
Its direction is `greater_is_better` if that is given; else what `evaluation.metric_table` states; else Trainer's rule,
by which smaller is better only if the name ends in "loss".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback

from hf_transfer.config.arguments.plan import is_wanted
from hf_transfer.config.arguments.schedule import FOLLOW_A_METRIC
from hf_transfer.errors import UserError, nearest
from hf_transfer.evaluation.metric_table import LOSS, greater_is_better
from hf_transfer.plan.plan import Plan
from hf_transfer.training.running import RunningTrainer

_SPEED = ("_runtime", "_per_second", "_preparation_time")

# ---- direction -----------------------------------------------------------------------------------------------------


def set_direction(args: Any, is_given: bool, sets: Iterable[str] = ()) -> None:
    """Set `greater_is_better`, and with a plan the mode of a schedule that follows the metric.

    Args:
        args: `TransferArguments`; changed.
        is_given: whether `greater_is_better` is the user's.
        sets: names of the evaluation sets, if there are several.
    """
    direction = None if args.metric_for_best_model is None else _direction(args.metric_for_best_model, sets)
    if direction is not None and not is_given:
        args.greater_is_better = direction
    if args.lr_scheduler_type in FOLLOW_A_METRIC and args.metric_for_best_model and is_wanted(args):
        mode = "max" if args.greater_is_better else "min"  # theirs is min, whatever the metric
        args.lr_scheduler_kwargs = {"mode": mode, **(args.lr_scheduler_kwargs or {})}


def _direction(metric: str, sets: Iterable[str]) -> bool | None:
    """Whether greater is better; None if it is not a metric of ours, alone or after the name of a set."""
    name = metric.removeprefix("eval_")
    of_sets = (name.removeprefix(f"{s}_") for s in sets if name.startswith(f"{s}_"))
    return next((d for d in map(greater_is_better, (name, *of_sets)) if d is not None), None)


def watched(args: Any) -> tuple[str, bool]:
    """(name in the log of the metric that decides, whether greater is better); without one the loss."""
    name = (args.metric_for_best_model or LOSS).removeprefix("eval_")
    return f"eval_{name}", bool(args.metric_for_best_model and args.greater_is_better)


def best_of(logs: Sequence[Mapping[str, Any]], name: str, greater: bool) -> Mapping[str, Any] | None:
    """The log entry of the best evaluation, the last one in case of a tie; None without any.

    Args:
        logs: `TrainerState.log_history`.
        name: of the metric in the log, including `eval_`.
        greater: whether greater is better.
    """
    sign = 1 if greater else -1
    evaluations = [log for log in logs if name in log and not math.isnan(log[name])]
    return max(evaluations, key=lambda log: (sign * log[name], log["step"]), default=None)


# ---- evaluations ---------------------------------------------------------------------------------------------------


def evaluation_sets(trainer: RunningTrainer) -> tuple[str, ...]:
    """Names of the evaluation sets; empty if there is at most one."""
    sets = trainer.eval_dataset
    return tuple(map(str, sets)) if isinstance(sets, dict) else ()


def check_metric(trainer: RunningTrainer, plan: Plan) -> None:
    """Check before training that one of several evaluation sets decides.

    Raises:
        UserError: `metric_for_best_model` names none of them.
    """
    sets = evaluation_sets(trainer)
    if not sets or not (plan.waits or trainer.args.load_best_model_at_end or trainer.args.early_stopping_patience):
        return
    log_name = watched(trainer.args)[0]
    name = log_name.removeprefix("eval_")
    if not any(name.startswith(f"{s}_") for s in sets):
        available = [f"{s}_{name}" for s in sets]
        raise UserError(
            f"there are several evaluation sets, and so no {log_name!r}.",
            f"Name the one that decides: {', '.join(available)}.",
            key="metric_for_best_model",
        )


def check_evaluated(names: Iterable[str], args: Any, sets: Iterable[str]) -> None:
    """Check that the metric is among the `names` of an evaluation, once all `sets` have been evaluated.

    Raises:
        UserError: it is not.
    """
    names, log_name = set(names), watched(args)[0]
    if log_name in names or not all(f"eval_{s}_runtime" in names for s in sets):
        return
    available = [n.removeprefix("eval_") for n in sorted(names) if n.startswith("eval_") and not n.endswith(_SPEED)]
    name = log_name.removeprefix("eval_")
    raise UserError(
        f"the evaluation has no {name!r}, it has {', '.join(available)}.{nearest(name, available)}",
        key="metric_for_best_model",
    )


# ---- early stopping ------------------------------------------------------------------------------------------------


def check_early_stopping(callbacks: Iterable[Any], args: Any, plan: Plan, steps_per_epoch: int, max_steps: int) -> None:
    """Check that an `EarlyStoppingCallback` leaves time to unfreeze.

    Args:
        callbacks: of the trainer.
        args: of the trainer.
        plan: resolved to steps.
        steps_per_epoch: optimizer steps per epoch.
        max_steps: optimizer steps of the run.

    Raises:
        UserError: it can end the run before anything is unfrozen.
    """
    patiences = [c.early_stopping_patience for c in callbacks if isinstance(c, EarlyStoppingCallback)]
    thaws = _first_thaw(plan)
    if not patiences or thaws is None:
        return
    stage, patience = plan.stages[thaws], min(patiences)
    before = plan.stages[thaws - 1]
    if before.patience is not None:
        needed, why = before.patience + 1, f"a plateau is {before.patience} evaluations without improvement"
    else:
        assert stage.start is not None, "a resolved plan"
        needed = _evaluations(args, stage.start, steps_per_epoch, max_steps)
        why = f"there are {needed} evaluations before"
    if patience < needed:
        raise UserError(
            f"early_stopping_patience {patience} can end the run before stage {stage.name!r} "
            f"unfreezes anything: {why}.",
            f"Set early_stopping_patience to at least {needed}.",
        )


def _first_thaw(plan: Plan) -> int | None:
    """Index of the first stage that trains what the first does not; None without one."""
    first = set(plan.stages[0].trainable)
    return next((i for i, stage in enumerate(plan.stages) if set(stage.trainable) - first), None)


def _evaluations(args: Any, until: int, steps_per_epoch: int, max_steps: int) -> int:
    """Number of evaluations up to optimizer step `until`, as Trainer's `DefaultFlowCallback` schedules them."""
    if args.eval_strategy == "epoch":
        first, last = max(1, math.ceil(args.eval_delay)), until // steps_per_epoch
    elif args.eval_strategy == "steps":
        interval = math.ceil(max_steps * args.eval_steps) if args.eval_steps < 1 else int(args.eval_steps)
        first, last = max(1, math.ceil(args.eval_delay / interval)), until // interval
    else:
        return 0
    return max(0, last - first + 1)
