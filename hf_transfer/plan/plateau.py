"""Stages that end when a metric stops improving: a pure function of what was logged.

The events are recomputed from the log history, which a checkpoint holds, so that a resumed run has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.plan.plan import Plan


@dataclass(frozen=True)
class Progress:
    """A stage so far.

    Attributes:
        evaluations: how many there were.
        best_step: the optimizer step of the best one, the first of equals; None before any.
        since_best: evaluations since then.
        last_step: the optimizer step of the last one.
    """

    evaluations: int = 0
    best_step: int | None = None
    since_best: int = 0
    last_step: int | None = None


def progress(logs: Sequence[Mapping[str, Any]], stage: int, metric: str, greater_is_better: bool) -> Progress:
    """What the evaluations of a stage show.

    Args:
        logs: `TrainerState.log_history`; an entry carries its `stage` and `step`.
        stage: index in the plan.
        metric: its name there, with `eval_`.
        greater_is_better: as in `TrainingArguments`. A value that is not a number is no gain.
    """
    found, best = Progress(), -math.inf
    for log in logs:
        if log.get("stage") != stage or metric not in log or log["step"] == found.last_step:
            continue  # `eval_on_start` evaluates once more where a run is resumed
        value = float(log[metric]) * (1 if greater_is_better else -1)
        if value > best:
            best = value
            found = Progress(found.evaluations + 1, log["step"], 0, log["step"])
        else:
            found = Progress(found.evaluations + 1, found.best_step, found.since_best + 1, log["step"])
    return found


def begun(plan: Plan, logs: Sequence[Mapping[str, Any]], metric: str, greater_is_better: bool) -> Plan:
    """`plan` with the first step of every stage that the log shows to have been reached."""
    for index, stage in enumerate(plan.stages[:-1]):
        if stage.patience is None or plan.stages[index + 1].start is not None:
            continue
        seen = progress(logs, index, metric, greater_is_better)
        if seen.last_step is None or seen.since_best < stage.patience:
            break
        plan = plan.begin(index + 1, seen.last_step)
    return plan
