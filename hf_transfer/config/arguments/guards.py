"""Keys of checkpoints, signals and non-finite values."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import key

POLICIES = ("stop", "skip", "rollback")


@dataclass
class GuardArguments:
    """Keys of what watches over a run."""

    on_nonfinite: str | None = key(
        None,
        "when the loss or the gradient is no number: stop, skip the step, or rollback to the newest checkpoint; "
        "the batch's examples are noted in nonfinite.jsonl",
        choices=POLICIES,
    )
    max_nonfinite: int = key(10, "on_nonfinite: steps to skip or roll back before the run stops all the same")
    save_on_signal: bool = key(True, "on SIGTERM and SIGINT finish the step, save a checkpoint and exit 143 or 130")
    allow_changed_plan: bool = key(
        False, "resume_from_checkpoint: go on although stages, rates or the schedule have changed since"
    )
