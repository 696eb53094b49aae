"""Keys of the learning rate over the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting
from hf_transfer.config.inherited import scheduler_types

OWN_SCHEDULES = ("one_cycle", "cosine_warm_restarts", "slanted_triangular")
FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")
WITHOUT_WARMUP = ("constant", *FOLLOW_A_METRIC)  # they never read warmup_steps
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
    name, evaluates = (str(getattr(values[k], "value", values[k])) for k in ("lr_scheduler_type", "eval_strategy"))
    problems = []
    if name in FOLLOW_A_METRIC and evaluates == "no":
        problems.append(
            f"lr_scheduler_type: {name} follows the evaluations, and eval_strategy: no makes none; set eval_strategy: "
            "epoch or steps."
        )
    if values["warmup_steps"] and name in WITHOUT_WARMUP:
        other = (
            "lr_scheduler_type: constant_with_warmup" if name == "constant" else "a schedule of the step, as linear is"
        )
        problems.append(
            f"warmup_steps: {values['warmup_steps']:g} has no effect with lr_scheduler_type: {name}, which has no "
            f"warm-up; leave it out, or use {other}."
        )
    return problems
