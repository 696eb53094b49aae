"""What each stage of a plan did, read off Trainer's log history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_transfer.plan.plan import Plan


@dataclass(frozen=True)
class StageRecord:
    """One stage that has begun.

    Attributes:
        name: as in the plan.
        start: its first optimizer step.
        steps: optimizer steps taken in it.
        seconds: wall time with evaluations; None for a stage that ran before the run was resumed.
        loss: mean training loss; None where nothing was logged.
        metrics: of the last evaluation in it.
        best_step: the step whose weights the next stage began with, where a plateau ended this one.
    """

    name: str
    start: int
    steps: int
    seconds: float | None
    loss: float | None
    metrics: dict[str, float]
    best_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stage_records(
    plan: Plan,
    logs: Sequence[Mapping[str, Any]],
    steps_taken: int,
    seconds: Mapping[int, float],
    best_steps: Mapping[int, int] | None = None,
) -> list[StageRecord]:
    """The stages of a resolved plan that have begun after `steps_taken` optimizer steps.

    Args:
        plan: resolved.
        logs: `TrainerState.log_history`; an entry carries its `stage`.
        steps_taken: optimizer steps so far.
        seconds: wall time by stage.
        best_steps: by stage, where a plateau ended it and the best weights were restored.
    """
    starts = [stage.start for stage in plan.stages if stage.start is not None]
    records = []
    for i, (stage, start) in enumerate(zip(plan.stages, starts, strict=False)):
        end = min([steps_taken, *starts[i + 1 : i + 2]])
        if end <= start:
            continue
        evaluations = [log for log in logs if log.get("stage") == i and any(k.startswith("eval_") for k in log)]
        metrics = {k: v for k, v in evaluations[-1].items() if k.startswith("eval_")} if evaluations else {}
        loss, best = _mean_loss(logs, i, start), (best_steps or {}).get(i)
        records.append(StageRecord(stage.name, start, end - start, seconds.get(i), loss, metrics, best))
    return records


def _mean_loss(logs: Sequence[Mapping[str, Any]], stage: int, start: int) -> float | None:
    """Mean over steps: each logged loss is the mean since the log before it, or since the stage began."""
    total, previous = 0.0, start
    for log in logs:
        if "loss" in log and log.get("stage") == stage:
            total += log["loss"] * (log["step"] - previous)
            previous = log["step"]
    return total / (previous - start) if previous > start else None
