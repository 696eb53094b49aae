"""The values of metrics, from arrays of logits and labels.

They equal scikit-learn's, which the tests compare them with. What is counted is kept per class, never per pair of
classes, and logits are read in parts: a test set of 100,000 examples and 1,000 classes fills 400 MB once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hf_transfer.evaluation.metric_table import TOP

Array = np.ndarray[Any, Any]
CALIBRATION_BINS = 15  # as in Guo et al. 2017
_PART = 2**20  # values that are copied or compared at a time


def parts(rows: int, width: int) -> Iterator[slice]:
    """Consecutive slices that cover `rows` rows of `width` values."""
    step = max(1, _PART // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


# ---- one label -----------------------------------------------------------------------------------------------------


def single_label(logits: Array, labels: Array) -> dict[str, Any]:
    """Metrics of single-label classification.

    Args:
        logits: (examples, classes).
        labels: (examples,) class indices.
    """
    predicted = logits.argmax(-1)
    scores: dict[str, Any] = from_counts(*class_counts(labels, predicted, logits.shape[-1]))
    scores["ece"] = calibration_error(confidence(logits), (predicted == labels).astype(float))
    if logits.shape[-1] > TOP:
        scores["top_5_accuracy"] = in_top(logits, labels).mean()
    return scores


def class_counts(labels: Array, predicted: Array, classes: int) -> tuple[Array, Array, Array]:
    """(true positives, examples, predictions) of each class, (classes,) each; from (examples,) class indices."""
    size = max(classes, int(labels.max(initial=0)) + 1)
    hits = np.bincount(labels[labels == predicted], minlength=size)
    return hits, np.bincount(labels, minlength=size), np.bincount(predicted, minlength=size)


def from_counts(hits: Array, true: Array, predicted: Array) -> dict[str, Array]:
    """Single-label metrics from counts, as defined by scikit-learn.

    Macro averages are over the classes that occur as a label or a prediction. MCC: Gorodkin 2004, equation 8.

    Args:
        hits: (..., classes) examples of the class that are predicted as such.
        true: (..., classes) examples of the class.
        predicted: (..., classes) predictions of the class.

    Returns:
        (...) values by metric.
    """
    hits, true, predicted = (counts.astype(float) for counts in (hits, true, predicted))
    occurs, total, correct = true + predicted > 0, true.sum(-1), hits.sum(-1)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, true, out=np.zeros_like(hits), where=true > 0)
    f1 = np.divide(2 * hits, true + predicted, out=np.zeros_like(hits), where=occurs)
    deviation = np.sqrt((total**2 - (predicted**2).sum(-1)) * (total**2 - (true**2).sum(-1)))
    covariance = correct * total - (true * predicted).sum(-1)
    return {
        "accuracy": correct / total,
        "f1_macro": f1.sum(-1) / occurs.sum(-1),
        "precision_macro": precision.sum(-1) / occurs.sum(-1),
        "recall_macro": recall.sum(-1) / occurs.sum(-1),
        "mcc": np.divide(covariance, deviation, out=np.zeros_like(covariance), where=deviation > 0),
    }


def calibration_error(confidence: Array, correct: Array) -> Array:
    """Expected calibration error: mean gap between confidence and accuracy over equal-width bins of confidence.

    Guo et al. 2017, equation 3.

    Args:
        confidence: (..., examples) probability of the predicted class, from 0 to 1.
        correct: (..., examples) of 0 and 1.

    Returns:
        (...) errors.
    """
    confidence = np.nan_to_num(confidence)  # NaN if the run diverged
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [np.abs(((correct - confidence) * (bins == b)).sum(-1)) for b in range(CALIBRATION_BINS)]
    return np.sum(gaps, axis=0) / confidence.shape[-1]


def confidence(logits: Array) -> Array:
    """Probability of the predicted class, (examples,): the largest softmax."""
    largest = np.empty(len(logits))
    for part in parts(*logits.shape):
        z = logits[part].astype(np.float64)
        z -= z.max(-1, keepdims=True)
        largest[part] = 1 / np.exp(z, out=z).sum(-1)
    return largest


def in_top(logits: Array, labels: Array) -> Array:
    """Whether the true class is among the five with the highest logits, (examples,); ties are broken by index."""
    found = np.empty(len(logits), bool)
    index = np.arange(logits.shape[-1])
    for part in parts(*logits.shape):
        z, label = logits[part], labels[part, None]
        own = np.take_along_axis(z, label, axis=-1)
        found[part] = ((z > own) | ((z == own) & (index < label))).sum(-1) < TOP
    return found


# ---- several labels ------------------------------------------------------------------------------------------------


def multi_label(logits: Array, labels: Array, limits: Array | float = 0.0) -> dict[str, Any]:
    """Metrics of multi-label classification.

    Args:
        logits: (examples, classes).
        labels: (examples, classes) of 0 and 1.
        limits: logit above which a label is predicted, one for all or (classes,).
    """
    hits, true, predicted = label_counts(logits, labels, limits)
    exact = sum(int(equal.sum()) for equal in _exact(logits, labels, limits))
    scores = from_label_counts(hits, true, predicted, exact / len(labels))
    if true.any() and all_finite(logits):  # average precision is undefined without positives
        scores["map"] = np.mean([average_precision(z, y) for z, y in columns(logits, labels) if y.any()])
    return scores


def label_counts(logits: Array, labels: Array, limits: Array | float = 0.0) -> tuple[Array, Array, Array]:
    """(true positives, positives, predictions) of each label, (classes,) each."""
    counts = np.zeros((3, logits.shape[-1]), int)
    for part in parts(*logits.shape):
        predicted, true = logits[part] > limits, labels[part] > 0
        counts += [(predicted & true).sum(0), true.sum(0), predicted.sum(0)]
    return counts[0], counts[1], counts[2]


def from_label_counts(hits: Array, true: Array, predicted: Array, accuracy: Any) -> dict[str, Any]:
    """F1 as defined by scikit-learn, 0 for a label without positives and predictions; with the subset accuracy.

    Args:
        hits: (..., classes) true positives.
        true: (..., classes) positives.
        predicted: (..., classes) predictions.
        accuracy: (...) fraction of examples with all labels right.
    """
    return {
        "f1_macro": _f1(hits, true, predicted).mean(-1),
        "f1_micro": _f1(hits.sum(-1), true.sum(-1), predicted.sum(-1)),
        "accuracy": accuracy,
    }


def _f1(hits: Array, true: Array, predicted: Array) -> Array:
    either = np.asarray(true + predicted, float)
    return np.divide(2.0 * hits, either, out=np.zeros_like(either), where=either > 0)


def _exact(logits: Array, labels: Array, limits: Array | float) -> Iterator[Array]:
    """Whether all labels of an example are right, in parts."""
    for part in parts(*logits.shape):
        yield ((logits[part] > limits) == (labels[part] > 0)).all(-1)


def exact_matches(logits: Array, labels: Array, limits: Array | float = 0.0) -> Array:
    """Whether all labels of an example are right, (examples,)."""
    return np.concatenate([*_exact(logits, labels, limits)])


def all_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite."""
    return all(np.isfinite(values[part]).all() for part in parts(*values.shape))


def columns(logits: Array, labels: Array) -> Iterator[tuple[Array, Array]]:
    """((examples,) logits, (examples,) whether it is positive) of each label."""
    for part in parts(logits.shape[-1], len(logits)):
        yield from zip(np.ascontiguousarray(logits[:, part].T), (labels[:, part] > 0).T, strict=True)


def average_precision(logits: Array, positive: Array) -> float:
    """Mean over the positives of the precision at their logit, as scikit-learn's.

    Args:
        logits: (examples,) finite.
        positive: (examples,) of bool, at least one of them true.
    """
    own = np.sort(logits[positive])
    above = len(logits) - np.searchsorted(np.sort(logits), own)
    return float(((len(own) - np.searchsorted(own, own)) / above).mean())


# ---- values --------------------------------------------------------------------------------------------------------


def regression(logits: Array, labels: Array) -> dict[str, Any]:
    """Metrics of regression, from (examples,) or (examples, 1) predictions and (examples,) values."""
    values = logits.reshape(labels.shape)
    scores = {
        "mae": np.abs(values - labels).mean(),  # scikit-learn rejects NaN, which a diverged run may predict
        "rmse": np.sqrt(np.square(values - labels).mean()),
    }
    if len(labels) > 1 and np.ptp(values) > 0 and np.ptp(labels) > 0:  # undefined for constants
        from scipy import stats  # slow to import

        scores |= {
            "pearson": stats.pearsonr(values, labels).statistic,
            "spearman": stats.spearmanr(values, labels).statistic,
        }
    return scores
