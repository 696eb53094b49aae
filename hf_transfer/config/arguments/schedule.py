"""Keys of the learning rate over the run."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting
from hf_transfer.config.inherited import scheduler_types

OWN_SCHEDULES = ("one_cycle", "cosine_warm_restarts", "slanted_triangular")
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
