"""Choose the L2 strength of a linear head by held-out examples or by cross-validation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_transfer.errors import UserError
from hf_transfer.evaluation import metric_table
from hf_transfer.features.averaged_head import AveragedProblem, averaged_logits
from hf_transfer.features.convex_head import MULTI, REGRESSION, STRENGTHS, Head
from hf_transfer.features.cross_validation import Array, divisions

# Weaker strengths take longest, and are not tried after so many without improvement of the metric or the loss.
PATIENCE = 3

Examples = tuple[torch.Tensor, torch.Tensor]  # (features, labels)


@dataclass(frozen=True)
class Solution:
    """The result of solving for a head.

    Attributes:
        l2: the chosen L2 strength.
        held_out: what it was chosen on: validation, or k-fold cross-validation.
        measure: metric that it was chosen by.
        score: of the held-out examples at that strength.
        loss: mean training loss, without the penalty.
        solutions: number of strengths that were tried.
        seconds: of solving.
        feature_seconds: of computing the features.
    """

    l2: float
    held_out: str
    measure: str
    score: float
    loss: float
    solutions: int
    seconds: float
    feature_seconds: float

    @property
    def whole_seconds(self) -> float:
        """Of features and solving."""
        return self.seconds + self.feature_seconds

    def __str__(self) -> str:
        return (
            f"probe: L2 {self.l2:.2g} of {STRENGTHS[-1]:.0e} … {STRENGTHS[0]:.0e}, {self.held_out} {self.measure} "
            f"{self.score:.4f} ({self.solutions} solutions in {self.seconds:.1f} s, features in "
            f"{self.feature_seconds:.1f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return {**asdict(self), "l2_grid": list(STRENGTHS)}

    def to_log(self) -> dict[str, Any]:
        """Its numbers, for the log."""
        return {f"probe_{name}": value for name, value in asdict(self).items() if not isinstance(value, str)}


class Measure:
    """What a strength is chosen by: `metric_for_best_model` if we compute it, else the loss.

    On few examples the loss is steadier than the accuracy, which moves in steps of 1/n.

    Args:
        kind: `problem_type` as in `transformers` configurations.
        outputs: of the head.
        metric_for_best_model: as in `TrainingArguments`.
        weights: (outputs,) of the classes, as the head is solved for; None for 1 each. They weigh the loss, no metric.

    Attributes:
        name: of the metric, or "loss".
    """

    def __init__(self, kind: str, outputs: int, metric_for_best_model: str | None, weights: torch.Tensor | None = None):
        self.kind, self.weights = kind, None if weights is None else weights.double()
        given = (metric_for_best_model or "").removeprefix("eval_")
        is_ours = given in metric_table.names(kind, outputs)
        self.metric = given if is_ours else ""
        self.name = self.metric or metric_table.LOSS
        self.sign = 1.0 if metric_table.greater_is_better(self.name) else -1.0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
        """(value for display, value to maximize, negative loss to break ties)."""
        from hf_transfer.evaluation import metrics  # slow to import

        loss = self._loss(logits, labels)
        if not self.metric:
            return loss, -loss, -loss
        truth = labels[:, 0] if self.kind == REGRESSION and labels.shape[1] == 1 else labels
        value = metrics.compute(self.kind, logits.numpy(), truth.numpy()).get(self.metric, self.sign * -math.inf)
        return value, self.sign * value, -loss

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        if self.kind == REGRESSION:
            return float((logits - labels).square().mean())
        if self.kind == MULTI:
            return float(
                nn.functional.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=self.weights)
            )
        return float(nn.functional.cross_entropy(logits, labels, weight=self.weights))


def choose(
    layer: nn.Linear,
    train: Examples,
    folded: Examples,
    validation: Examples | None,
    measure: Measure,
    seed: int,
    feature_seconds: float,
    parts: Sequence[int],
    l2: float | None = None,
) -> tuple[Head, Solution]:
    """The head at the strength with the best held-out score; among equal scores and losses the stronger.

    Args:
        layer: the head.
        train: training examples.
        folded: those of them that cross-validation divides, none of them twice.
        validation: held-out examples; None for cross-validation.
        measure: of a strength; its class weights are those of the head's loss.
        seed: of the folds.
        feature_seconds: that the features took.
        parts: widths of the features' parts, on each of which a head is solved for; see `features.averaged_head`.
        l2: the strength, if it is known.
    """
    strengths = STRENGTHS if l2 is None else (l2,)
    began, kind, weights = time.perf_counter(), measure.kind, measure.weights

    whole = AveragedProblem(parts, kind, *train, layer.out_features, weights, layer.bias is not None)
    if validation is not None:
        held_out, (x, labels) = "validation", validation
        paths: Iterable[torch.Tensor] = (one.logits(x) for one in whole.path(strengths))
    else:
        labels, draws = folded[1], _draw(kind, folded[1], seed)
        held_out = f"{len(np.unique(draws))}-fold cross-validation"
        problem = parts, kind, *folded, layer.out_features, draws
        known = whole.problems if len(folded[1]) == len(train[1]) else None  # the same examples
        found = averaged_logits(*problem, strengths, weights, layer.bias is not None, known)
        paths = (one[0] for one in found)
    scores, best = _scores(paths, labels, measure)
    head = whole.exact(strengths[best])
    seconds = time.perf_counter() - began
    loss = whole.loss(head, train[0])
    score = scores[best][0]
    return head, Solution(strengths[best], held_out, measure.name, score, loss, len(scores), seconds, feature_seconds)


def _scores(
    paths: Iterable[torch.Tensor], labels: torch.Tensor, measure: Measure
) -> tuple[list[tuple[float, float, float]], int]:
    """(by strength, the measure over the held-out examples; index of the best).

    Args:
        paths: their logits, by strength.
        labels: of them.
        measure: of the logits.
    """
    scores: list[tuple[float, float, float]] = []
    best = least_loss = 0
    for i, logits in enumerate(paths):
        scores.append(measure(logits, labels))
        best = i if scores[i][1:] > scores[best][1:] else best
        least_loss = i if scores[i][2] > scores[least_loss][2] else least_loss
        if i - max(best, least_loss) >= PATIENCE:
            break
    return scores, best


def _draw(kind: str, labels: torch.Tensor, seed: int) -> Sequence[Array]:
    """One division into folds."""
    if len(labels) < 2:
        raise UserError("One example is too few to solve for a head.", "Add examples, or use probe_solver: sgd.")
    return divisions(kind, labels, 1, seed)
