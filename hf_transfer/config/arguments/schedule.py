"""Keys of the learning rate over the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting
from hf_transfer.config.inherited import scheduler_types

OWN_SCHEDULES = ("one_cycle", "cosine_warm_restarts", "slanted_triangular")
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # they never read warmup_steps
LR_SCHEDULER_TYPES = (*scheduler_types(), *OWN_SCHEDULES)


@dataclass
class ScheduleArguments:
    """How learning rates change over the run."""

    lr_scheduler_type: str = setting(
        "linear",
        "factor on all learning rates over the run",
        choices=LR_SCHEDULER_TYPES,
        topic="learning rate",
        resume="plan",
        card="always",
    )


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys, among all keys of training, one sentence each."""
    name = str(getattr(values["lr_scheduler_type"], "value", values["lr_scheduler_type"]))
    if not values["warmup_steps"] or name not in WITHOUT_WARMUP:
        return []
    other = (
        "lr_scheduler_type: constant_with_warmup" if name == "constant" else "a schedule of the step, such as linear"
    )
    return [
        f"warmup_steps: {values['warmup_steps']:g} has no effect with lr_scheduler_type: {name}, which has no warm-up; "
        f"leave it out, or use {other}."
    ]
