"""What a model's probabilities are worth on held-out examples, as the numbers that a report draws.

Reliability: how often answers of a confidence are right (Guo et al. 2017, figure 1). Coverage: the accuracy if only the
most confident answers are given (El-Yaniv & Wiener 2010). Thresholds: precision, recall and F1 of several labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.scores import CALIBRATION_BINS, Array, parts

THRESHOLDS = tuple(i / 20 for i in range(1, 20))
_COVERAGES = tuple(i / 40 for i in range(1, 41))
_MOST_LABELS = 50  # labels with a curve of their own
_MOST_POINTS = 500  # of a regression


@dataclass(frozen=True)
class Change:
    """What was done to a classifier's logits after training.

    Attributes:
        temperature: that they were divided by.
        offsets: that were added to them afterwards, (classes,); empty without any.
    """

    temperature: float = 1.0
    offsets: Sequence[float] = ()

    def undone(self, logits: Array) -> Array:
        """The logits as they would be without it.

        Args:
            logits: (examples, classes).
        """
        shifted = logits - np.asarray(self.offsets, dtype=np.float64) if len(self.offsets) else logits
        return shifted * self.temperature


def diagnose(
    problem_type: str, names: Sequence[str], logits: Array, labels: Array, change: Change | None = None
) -> dict[str, Any]:
    """The numbers of the curves, for `results.json`; empty where a logit is NaN or infinite.

    Args:
        problem_type: as in `transformers` configurations.
        names: of the classes.
        logits: (examples, outputs).
        labels: (examples,) class indices or values, or (examples, classes) of 0 and 1.
        change: what was done to the logits after training; None for nothing.

    Returns:
        Classification: `reliability` and, of the logits before `change`, `reliability_before` (see `reliability`; with
        several labels of the pairs of example and label). One label: `coverage`. Several labels: `thresholds`.
        Regression: `points`, pairs of true and predicted value, at most 500, evenly over the examples.
    """
    if not len(labels) or not scores.all_finite(logits.reshape(len(labels), -1)):
        return {}
    if problem_type == REGRESSION:
        step = -(-len(labels) // _MOST_POINTS)
        return {"points": np.stack([labels.reshape(-1), logits.reshape(-1)], axis=1)[::step].tolist()}
    judged = _pairs if problem_type == MULTI_LABEL else _answers
    now = judged(logits, labels, Change())
    found: dict[str, Any] = {"reliability": reliability(*now)}
    if change is not None:
        found["reliability_before"] = reliability(*judged(logits, labels, change))
    if problem_type == MULTI_LABEL:
        return found | {"thresholds": thresholds(names, logits, labels)}
    return found | {"coverage": coverage(*now)}


def calibration_of(problem_type: str, logits: Array, labels: Array) -> dict[str, Any]:
    """How far the probabilities match frequencies; empty for regression, and where a logit is NaN or infinite.

    Args:
        problem_type: as of `diagnose`, like the others.
        logits: likewise.
        labels: likewise.

    Returns:
        `confidence`, the mean probability of the answers, `accuracy`, the fraction of them that are right, the expected
        calibration error `ece` and its bins, `reliability` (see there). With several labels, of all pairs of example
        and label: the probability of the label, and how often it is there.
    """
    if problem_type == REGRESSION or not scores.all_finite(logits):
        return {}
    probability, correct = (_pairs if problem_type == MULTI_LABEL else _answers)(logits, labels, Change())
    return {
        "ece": float(scores.calibration_error(probability, correct)),
        "confidence": float(probability.mean()),
        "accuracy": float(correct.mean()),
        "reliability": reliability(probability, correct),
    }


def _answers(logits: Array, labels: Array, change: Change) -> tuple[Array, Array]:
    """(confidence of each answer, whether it is right)."""
    confidence, correct = np.empty(len(labels)), np.empty(len(labels))
    for part in parts(*logits.shape):
        undone = change.undone(logits[part])
        confidence[part], correct[part] = scores.confidence(undone), undone.argmax(-1) == labels[part]
    return confidence, correct


def _pairs(logits: Array, labels: Array, change: Change) -> tuple[Array, Array]:
    """(probability of each pair of example and label, whether it is positive)."""
    return expit(change.undone(logits)).ravel(), (labels > 0).astype(float).ravel()


def reliability(probability: Array, correct: Array) -> dict[str, list[Any]]:
    """How often answers are right, by their probability.

    Args:
        probability: (answers,) from 0 to 1.
        correct: (answers,) of 0 and 1.

    Returns:
        For each of 15 equal bins of the probability: `count` of answers, their mean `confidence`, and their `accuracy`;
        the latter two are None where there are no answers.
    """
    bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    means = [
        [float(s / n) if n else None for s, n in zip(np.bincount(bins, v, CALIBRATION_BINS), count, strict=True)]
        for v in (probability, correct)
    ]
    return {"count": count.tolist(), "confidence": means[0], "accuracy": means[1]}


def coverage(confidence: Array, correct: Array) -> dict[str, list[float]]:
    """Accuracy of the most confident answers, by the fraction of examples that they are.

    Args:
        confidence: (answers,).
        correct: (answers,) of 0 and 1.

    Returns:
        `coverage`, `accuracy`, and `confidence` from which an answer is among them; of equally confident answers, the
        mean accuracy counts for each.
    """
    order = np.argsort(-confidence, kind="stable")
    ordered, right = confidence[order], correct[order].astype(float)
    _, group = np.unique(-ordered, return_inverse=True)
    right = (np.bincount(group, right) / np.bincount(group))[group]
    counts = np.unique([max(1, round(share * len(ordered))) for share in _COVERAGES])
    return {
        "coverage": (counts / len(ordered)).tolist(),
        "accuracy": (np.cumsum(right)[counts - 1] / counts).tolist(),
        "confidence": ordered[counts - 1].tolist(),
    }


def thresholds(names: Sequence[str], logits: Array, labels: Array) -> dict[str, Any]:
    """Metrics of several labels, by the probability above which a label is predicted.

    Args:
        names: of the labels.
        logits: (examples, classes).
        labels: (examples, classes) of 0 and 1.

    Returns:
        `threshold`; `precision` and `recall` over all labels, `f1_micro` and `f1_macro` at each; and `labels`: name
        and `f1` of each, of at most 50, those with most positives. A value is None where nothing is predicted.
    """
    counts = np.array([scores.label_counts(logits, labels, float(logit(t))) for t in THRESHOLDS])  # (T, 3, classes)
    hits, true, predicted = counts[:, 0], counts[:, 1], counts[:, 2]
    f1 = scores.from_label_counts(hits, true, predicted, 0.0)
    own = np.divide(2.0 * hits, true + predicted, out=np.zeros(hits.shape), where=true + predicted > 0)
    shown = sorted(np.argsort(-true[0], kind="stable")[:_MOST_LABELS].tolist())
    return {
        "threshold": list(THRESHOLDS),
        "precision": _fractions(hits.sum(1), predicted.sum(1)),
        "recall": _fractions(hits.sum(1), true.sum(1)),
        "f1_micro": f1["f1_micro"].tolist(),
        "f1_macro": f1["f1_macro"].tolist(),
        "labels": [{"label": names[i], "f1": own[:, i].tolist()} for i in shown],
    }


def _fractions(part: Array, whole: Array) -> list[float | None]:
    return [float(p / w) if w else None for p, w in zip(part, whole, strict=True)]
