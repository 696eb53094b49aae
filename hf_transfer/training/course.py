"""Whether training makes the model worse: evaluations of the validation split compared with the best one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import EvalPrediction

from hf_transfer.evaluation.metric_table import LEADING, greater_is_better
from hf_transfer.evaluation.noise import contributions, difference_error
from hf_transfer.evaluation.scores import Array
from hf_transfer.evaluation.thresholds import logits_of
from hf_transfer.training.best_metric import best_of
from hf_transfer.training.running import RunningTrainer

# Standard errors of the difference. More than the usual 2, because the best of several evaluations is partly luck.
BEYOND_CHANCE = 2.5


@dataclass(frozen=True)
class Drop:
    """An evaluation that is worse than an earlier one by more than chance explains.

    Attributes:
        metric: that is compared.
        value: now.
        best: of the best evaluation before.
        best_epoch: when that was.
        examples: on which both were measured.
    """

    metric: str
    value: float
    best: float
    best_epoch: float
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"worse than {self.best:.4f} at epoch {self.best_epoch:.2f}, by more than chance"


class Course:
    """Compares the evaluations of a run.

    Attributes:
        trainer: set once it exists.
        drop: of the newest evaluation; None unless it is significantly worse than the best one before.
    """

    trainer: RunningTrainer

    def __init__(self, problem_type: str):
        self.problem_type = problem_type
        self.metric = LEADING[problem_type][0]
        self.sign = 1 if greater_is_better(self.metric) else -1
        self.drop: Drop | None = None
        self._best: tuple[float, float, Array] | None = None  # (metric, epoch, contributions)

    def watching(
        self, compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        """A Trainer's `compute_metrics` that also compares the evaluations during training."""

        def watched(prediction: EvalPrediction) -> dict[str, float]:
            if self.trainer.is_in_train:
                self._note(prediction)
            return compute_metrics(prediction)

        return watched

    def _note(self, prediction: EvalPrediction) -> None:
        now = self._contributions(prediction)
        self.drop = self._compare(now)
        if self._best is None or self.sign * (now.mean() - self._best[0]) >= 0:
            self._best = float(now.mean()), self.trainer.state.epoch or 0.0, now

    def _contributions(self, prediction: EvalPrediction) -> Array:
        return contributions(self.problem_type, logits_of(prediction.predictions), prediction.label_ids)

    def compare(self, prediction: EvalPrediction) -> Drop | None:
        """Compare an evaluation of the validation split with the best one during training."""
        return self._compare(self._contributions(prediction))

    def _compare(self, now: Array) -> Drop | None:
        best, before = self._best, None if self._best is None else self._best[2]
        logged = best_of(self.trainer.state.log_history, f"eval_{self.metric}", self.sign > 0)
        if logged is not None:  # of before the run was resumed, only the metric is known
            value = float(logged[f"eval_{self.metric}"])
            if best is None or self.sign * (value - best[0]) > 1e-6:
                best, before = (value, logged["epoch"], now), None
        if best is None:
            return None
        worse = self.sign * (best[0] - now.mean())
        if not worse > BEYOND_CHANCE * difference_error(now, before):  # also if one is NaN
            return None
        return Drop(self.metric, float(now.mean()), best[0], best[1], len(now))
