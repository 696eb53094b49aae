"""Metrics of predictions.

Each problem type has one `evaluate.Metric`. They are defined here because `evaluate.load` downloads metrics from the
hub and runs code from the working directory. `compute` gives the same values from arrays without writing files, and is
used during training. Their names and directions are in `metric_table`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from scipy.special import expit

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.intervals import intervals
from hf_transfer.evaluation.metric_table import METRIC_TABLE, names
from hf_transfer.evaluation.scores import Array, calibration_error

__all__ = [
    "METRICS",
    "Array",
    "MultiLabelMetrics",
    "RegressionMetrics",
    "SingleLabelMetrics",
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


class _OfLogits(evaluate.Metric, ABC):
    """All metrics of a problem type; `predictions` are logits, as required for ranking and calibration metrics."""

    description: ClassVar[str]
    references: ClassVar[Any]
    predictions: ClassVar[Any] = Sequence(Value("float64"))

    def __init__(self, *args: Any, keep_in_memory: bool = True, **kwargs: Any):
        super().__init__(*args, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: logits; references: labels.",
            features=Features({"predictions": self.predictions, "references": self.references}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        values = self.of(np.asarray(predictions), np.asarray(references))
        return {k: float(v) for k, v in values.items()}

    @staticmethod
    @abstractmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        """The metrics by name, from arrays of logits and labels."""


class SingleLabelMetrics(_OfLogits):
    """Accuracy, macro F1, precision and recall, MCC, expected calibration error; top-5 accuracy with over five classes.

    predictions: (examples, classes) logits. references: (examples,) class indices.
    """

    description = "Metrics of single-label classification."
    references = Value("int64")
    of = staticmethod(scores.single_label)


class MultiLabelMetrics(_OfLogits):
    """Macro and micro F1 and subset accuracy at a probability of 0.5, and mean average precision.

    predictions: (examples, classes) logits. references: (examples, classes) of 0 and 1.
    """

    description = "Metrics of multi-label classification."
    references = Sequence(Value("float64"))
    of = staticmethod(scores.multi_label)


class RegressionMetrics(_OfLogits):
    """Mean absolute and root mean squared error; Pearson and Spearman correlation unless one side is constant.

    predictions: (examples,) values. references: (examples,) values.
    """

    description = "Metrics of regression."
    predictions = references = Value("float64")
    of = staticmethod(scores.regression)


METRICS: dict[str, type[_OfLogits]] = {
    SINGLE_LABEL: SingleLabelMetrics,
    MULTI_LABEL: MultiLabelMetrics,
    REGRESSION: RegressionMetrics,
}


def compute(problem_type: str, logits: Array, labels: Array, limits: Array | float = 0.0) -> dict[str, float]:
    """The same metrics as `METRICS[problem_type]().compute`.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs) logits.
        labels: (examples,) class indices, (examples, classes) of 0 and 1, or (examples,) values.
        limits: multi-label classification: the logit above which a label is predicted, one for all or (classes,).
    """
    if problem_type == MULTI_LABEL:
        values = scores.multi_label(logits, labels, limits)
    else:
        values = METRICS[problem_type].of(logits, labels)
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
