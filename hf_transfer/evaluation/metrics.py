"""Metrics of predictions, from arrays.

Their names and directions are in `metric_table`; `evaluate_metrics` makes an `evaluate.Metric` of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.intervals import intervals
from hf_transfer.evaluation.metric_table import METRIC_TABLE, names
from hf_transfer.evaluation.scores import Array, calibration_error

__all__ = [
    "Array",
    "baseline",
    "best_thresholds",
    "calibration_error",
    "compute",
    "confusion",
    "constant_labels",
    "intervals",
    "names",
]
MATRIX_CLASSES = 100  # above this, the pairs of classes that occur take less space than a matrix


def compute(problem_type: str, logits: Array, labels: Array, limits: Array | float = 0.0) -> dict[str, float]:
    """All metrics of a problem type, by name.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs) logits.
        labels: (examples,) class indices, (examples, classes) of 0 and 1, or (examples,) values.
        limits: multi-label classification: the logit above which a label is predicted, one for all or (classes,).
    """
    if problem_type == MULTI_LABEL:
        values = scores.multi_label(logits, labels, limits)
    else:
        values = (scores.single_label if problem_type == SINGLE_LABEL else scores.regression)(logits, labels)
    return {k: float(v) for k, v in values.items()}


def baseline(problem_type: str, train: Array, held_out: Array, num_labels: int) -> dict[str, float]:
    """Metrics of a constant prediction, which ignores the input.

    It predicts the most frequent class of the training set, its `constant_labels`, or its mean. Metrics of ranking and
    calibration are left out, because they are meaningless for a constant.

    Args:
        problem_type: as in `transformers` configurations.
        train: labels of the training examples.
        held_out: labels of the evaluated examples.
        num_labels: number of outputs of the model.
    """
    count = len(held_out)
    if problem_type == REGRESSION:
        values = scores.regression(np.full(count, train.mean()), held_out)
    elif problem_type == MULTI_LABEL:
        constant = np.broadcast_to(2.0 * constant_labels(train) - 1, (count, num_labels))
        exact = scores.exact_matches(constant, held_out).mean()
        values = scores.from_label_counts(*scores.label_counts(constant, held_out), exact)
    else:
        most = np.full(count, np.bincount(train, minlength=num_labels).argmax())
        values = scores.from_counts(*scores.class_counts(held_out, most, num_labels))
    return {name: float(value) for name, value in values.items() if METRIC_TABLE[name].of_constants}


def constant_labels(train: Array) -> Array:
    """Which labels a constant answer has that reaches the highest micro F1 on the training set, (classes,) of bool.

    They are the most frequent ones. The answer that is right most often is often no label at all, whose F1 is 0.

    Args:
        train: (examples, classes) of 0 and 1.
    """
    positives = np.asarray(train).sum(axis=0)
    order = np.argsort(-positives, kind="stable")
    f1 = 2 * positives[order].cumsum() / (np.arange(1, len(order) + 1) * len(train) + max(positives.sum(), 1))
    members = np.zeros(len(order), bool)
    members[order[: int(f1.argmax()) + 1]] = positives.any()
    return members


def confusion(problem_type: str, logits: Array, labels: Array, limits: Array | float = 0.0) -> Any:
    """Confusion counts.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, classes) logits.
        labels: (examples,) class indices, or (examples, classes) of 0 and 1.
        limits: as in `compute`.

    Returns:
        For single-label classification the confusion matrix as nested lists, (true class, predicted class). With more
        than 100 classes, `{"pairs": [[true class, predicted class, count], ...]}` of the pairs that occur. For
        multi-label classification (classes, 3): true positives, false positives and false negatives. Empty for
        regression.
    """
    if problem_type == SINGLE_LABEL:
        classes = logits.shape[-1]
        cells = labels.astype(np.int64) * classes + logits.argmax(-1)
        if classes <= MATRIX_CLASSES:
            return np.bincount(cells, minlength=classes**2).reshape(classes, classes).tolist()
        pairs, counts = np.unique(cells, return_counts=True)
        return {"pairs": np.stack([pairs // classes, pairs % classes, counts], axis=1).tolist()}
    if problem_type == MULTI_LABEL:
        hits, true, predicted = scores.label_counts(logits, labels, limits)
        return np.stack([hits, predicted - hits, true - hits], axis=1).tolist()
    return []


def best_thresholds(logits: Array, labels: Array, least: int = 5) -> list[float]:
    """The threshold on the probability of each label that maximizes its F1.

    It is halfway between two adjacent predicted probabilities; 0.5 for labels with fewer than `least` positives or
    negatives, and for non-finite logits.

    Args:
        logits: (examples, classes) logits.
        labels: (examples, classes) of 0 and 1.
        least: minimum number of positives, and of negatives.
    """
    thresholds = []
    for z, y in scores.columns(logits, labels):
        order = np.argsort(-z)
        z, y = z[order].astype(np.float64), y[order]
        true_positives, positives = np.cumsum(y), np.arange(1, len(y) + 1)
        f1 = 2 * true_positives / (positives + y.sum())
        f1[:-1][z[:-1] == z[1:]] = -1.0  # no threshold separates equal logits
        best = int(f1.argmax())
        probability = expit(z)
        below = probability[best + 1] if best + 1 < len(y) else 0.0
        enough = least <= y.sum() <= len(y) - least and np.isfinite(z).all()
        thresholds.append(float((probability[best] + below) / 2) if enough else 0.5)
    return thresholds
