"""What each stage of a plan did, computed from the Trainer's log history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_transfer.plan.plan import Plan


@dataclass(frozen=True)
class StageRecord:
    """Record of a stage that has started.

    Attributes:
        name: name of the stage in the plan.
        start: first optimizer step.
        steps: number of optimizer steps taken.
        seconds: wall time including evaluations; None if the stage ran before the run was resumed.
        loss: mean training loss; None if none was logged.
        metrics: metrics of the last evaluation.
        best_step: optimizer step whose weights were restored for the next stage, if a plateau ended this one.
    """

    name: str
    start: int
    steps: int
    seconds: float | None
    loss: float | None
    metrics: dict[str, float]
    best_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return asdict(self)


def stage_records(
    plan: Plan,
    logs: Sequence[Mapping[str, Any]],
    steps_taken: int,
    seconds: Mapping[int, float],
    best_steps: Mapping[int, int] | None = None,
) -> list[StageRecord]:
    """Records of the stages that have started after `steps_taken` optimizer steps.

    Args:
        plan: a resolved plan.
        logs: `TrainerState.log_history`, whose entries have `stage`.
        steps_taken: optimizer steps so far.
        seconds: wall time of each stage.
        best_steps: optimizer step of the restored weights, for each stage that a plateau ended.
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
    """Mean over steps; each logged loss is a mean since the previous log, or since the start of the stage."""
    total, previous = 0.0, start
    for log in logs:
        if "loss" in log and log.get("stage") == stage:
            total += log["loss"] * (log["step"] - previous)
            previous = log["step"]
    return total / (previous - start) if previous > start else None
