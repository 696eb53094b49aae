"""How far a metric may differ between two evaluations by chance, from what each example contributes to it."""

from __future__ import annotations

import math

import numpy as np

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.evaluation.scores import Array


def contributions(problem_type: str, logits: Array, labels: Array) -> Array:
    """What each example contributes to the leading metric (`metric_table.LEADING`), (examples,); their mean is it.

    For accuracy this is whether the example is right. Micro F1 and RMSE are functions of means, linearized at the
    metric (the delta method: Oehlert 1992).

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs).
        labels: as in `metrics.compute`.
    """
    if problem_type == REGRESSION:
        squares = np.square(logits.reshape(labels.shape).astype(float) - labels)
        rmse = math.sqrt(squares.mean())
        return rmse + (squares - squares.mean()) / (2 * rmse) if rmse else squares
    if problem_type == MULTI_LABEL:
        predicted, true = logits > 0, labels > 0
        hits, either = 2.0 * (predicted & true).sum(-1), (predicted.sum(-1) + true.sum(-1)).astype(float)
        if not either.any():
            return either
        f1 = hits.sum() / either.sum()
        return f1 + (hits - f1 * either) / either.mean()
    return (logits.argmax(-1) == labels).astype(float)


def difference_error(now: Array, before: Array | None) -> float:
    """Standard error of the difference between two evaluations of the same examples.

    Args:
        now: contributions, (examples,).
        before: those of the other evaluation; None if only its metric is known, and then the two count as independent
            and equally noisy, which is a larger error than that of pairs.
    """
    if len(now) < 2:
        return math.inf
    if before is None or len(before) != len(now):
        return math.sqrt(2 / len(now)) * float(now.std(ddof=1))
    return float((now - before).std(ddof=1)) / math.sqrt(len(now))
