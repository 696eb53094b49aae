"""Plateaus, as a function of the log alone: what a resumed run computes again."""

from __future__ import annotations

import pytest

from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.plan.plateau import begun, progress

LOSSES = (0.9, 0.5, 0.6, 0.7)


def logs(losses, stage=0, interval=2):
    return [{"stage": stage, "step": interval * (i + 1), "eval_loss": loss} for i, loss in enumerate(losses)]


def waiting(patience: int) -> Plan:
    """The head until a plateau, then everything."""
    stages = (
        Stage(
            name="head",
            epochs=None,
            trainable=("head",),
            rates=(1.0,),
            patterns=(),
            num_trainable=2,
            patience=patience,
            start=0,
        ),
        Stage(name="all", epochs=None, trainable=("body", "head"), rates=(1.0, 1.0), patterns=(), num_trainable=10),
    )
    return Plan("gradual", (("body", 8), ("head", 2)), stages, num_train_epochs=4.0)


def test_progress_counts_evaluations_since_the_best():
    seen = progress(logs(LOSSES), 0, "eval_loss", greater_is_better=False)
    assert (seen.evaluations, seen.best_step, seen.since_best, seen.last_step) == (4, 4, 2, 8)


@pytest.mark.parametrize(("evaluations", "start"), [(2, None), (3, None), (4, 8)])
def test_a_stage_begins_at_exactly_its_patience(evaluations, start):
    plan = begun(waiting(patience=2), logs(LOSSES[:evaluations]), "eval_loss", greater_is_better=False)
    assert plan.stages[1].start == start
