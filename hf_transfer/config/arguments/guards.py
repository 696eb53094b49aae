"""Keys of the preflight, checkpoints, signals and non-finite values."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting

POLICIES = ("stop", "skip", "rollback")


@dataclass
class GuardArguments:
    """Keys of what watches over a run."""

    preflight: bool = setting(
        True,
        "before the first step, try what would fail later: the tokens of all splits, an evaluation batch, the longest "
        "and the shortest example, the last batch, saving and loading",
        resume="free",
    )
    on_nonfinite: str | None = setting(
        None,
        "on a NaN or infinite loss or gradient: stop, skip the step, or rollback to the newest checkpoint; the batch's "
        "examples are recorded in nonfinite.jsonl",
        choices=POLICIES,
        resume="free",
    )
    max_nonfinite: int = setting(
        10, "on_nonfinite: steps to skip or roll back before the run stops anyway", minimum=0, resume="free"
    )
    save_on_signal: bool = setting(
        True, "on SIGTERM and SIGINT, finish the step, save a checkpoint and exit with 143 or 130", resume="free"
    )
    allow_changed_plan: bool = setting(
        False,
        "resume_from_checkpoint: continue although the plan has changed",
        resume="free",
    )
