"""Stages that end when a metric stops improving, as a pure function of the log history.

Plateaus are recomputed from the log history, which is part of every checkpoint, so that a resumed run sees the same
ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.plan.plan import Plan


@dataclass(frozen=True)
class Progress:
    """The evaluations of a stage so far.

    Attributes:
        evaluations: number of evaluations.
        best_step: optimizer step of the best evaluation (the first one in case of a tie); None without any.
        since_best: number of evaluations after the best one.
        last_step: optimizer step of the last evaluation.
    """

    evaluations: int = 0
    best_step: int | None = None
    since_best: int = 0
    last_step: int | None = None


def progress(logs: Sequence[Mapping[str, Any]], stage: int, metric: str, greater_is_better: bool) -> Progress:
    """Summarize the evaluations of a stage.

    Args:
        logs: `TrainerState.log_history`, whose entries have `stage` and `step`.
        stage: index of the stage in the plan.
        metric: name of the metric in the log, including `eval_`.
        greater_is_better: as in `TrainingArguments`. NaN is never an improvement.
    """
    so_far, best = Progress(), -math.inf
    for log in logs:
        if log.get("stage") != stage or metric not in log or log["step"] == so_far.last_step:
            continue  # `eval_on_start` evaluates again when a run is resumed
        value = float(log[metric]) * (1 if greater_is_better else -1)
        if value > best:
            best = value
            so_far = Progress(so_far.evaluations + 1, log["step"], 0, log["step"])
        else:
            so_far = Progress(so_far.evaluations + 1, so_far.best_step, so_far.since_best + 1, log["step"])
    return so_far


def begun(plan: Plan, logs: Sequence[Mapping[str, Any]], metric: str, greater_is_better: bool) -> Plan:
    """`plan` with the first step of every stage that has been reached according to the log; see `progress`."""
    for index, stage in enumerate(plan.stages[:-1]):
        if stage.patience is None or plan.stages[index + 1].start is not None:
            continue
        so_far = progress(logs, index, metric, greater_is_better)
        if so_far.last_step is None or so_far.since_best < stage.patience:
            break
        plan = plan.begin(index + 1, so_far.last_step)
    return plan
