"""Metrics of predictions, with confidence intervals.

Each problem type has one `evaluate.Metric`, which uses scikit-learn's functions. They are defined here because
`evaluate.load` downloads metrics from the hub and runs code from the working directory. `compute` gives the same values
from arrays without writing files, and is used during training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from scipy import stats
from scipy.special import expit, softmax
from sklearn import metrics as sk

Array = np.ndarray[Any, Any]
BOOTSTRAP_SAMPLES = 1000
SLOW_BOOTSTRAP_SAMPLES = 200  # for metrics that are computed separately for each sample
CONFIDENCE = 0.95
CALIBRATION_BINS = 15  # as in Guo et al. 2017
TOP = 5


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
        scores = self.of(np.asarray(predictions), np.asarray(references))
        return {k: float(v) for k, v in scores.items()}

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

    @staticmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        predicted = logits.argmax(-1)
        average = {"average": "macro", "zero_division": 0}
        scores = {
            "accuracy": sk.accuracy_score(labels, predicted),
            "f1_macro": sk.f1_score(labels, predicted, **average),
            "precision_macro": sk.precision_score(labels, predicted, **average),
            "recall_macro": sk.recall_score(labels, predicted, **average),
            "mcc": sk.matthews_corrcoef(labels, predicted),
            "ece": calibration_error(*_confidence(logits, labels)),
        }
        if logits.shape[-1] > TOP:
            scores["top_5_accuracy"] = _in_top(logits, labels).mean()
        return scores


class MultiLabelMetrics(_OfLogits):
    """Macro and micro F1 and subset accuracy at a probability of 0.5, and mean average precision.

    predictions: (examples, classes) logits. references: (examples, classes) of 0 and 1.
    """

    description = "Metrics of multi-label classification."
    references = Sequence(Value("float64"))

    @staticmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        predicted, present = (logits > 0).astype(int), labels.any(axis=0)
        scores = {
            "f1_macro": sk.f1_score(labels, predicted, average="macro", zero_division=0),
            "f1_micro": sk.f1_score(labels, predicted, average="micro", zero_division=0),
            "accuracy": sk.accuracy_score(labels, predicted),
        }
        if present.any() and np.isfinite(logits).all():  # average precision is undefined without positives
            scores["map"] = sk.average_precision_score(labels[:, present], logits[:, present], average="macro")
        return scores


class RegressionMetrics(_OfLogits):
    """Mean absolute and root mean squared error; Pearson and Spearman correlation unless one side is constant.

    predictions: (examples,) values. references: (examples,) values.
    """

    description = "Metrics of regression."
    predictions = references = Value("float64")

    @staticmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        values = logits.reshape(labels.shape)
        scores = {
            "mae": np.abs(values - labels).mean(),  # scikit-learn rejects NaN, which a diverged run may predict
            "rmse": np.sqrt(np.square(values - labels).mean()),
        }
        if len(labels) > 1 and np.ptp(values) > 0 and np.ptp(labels) > 0:  # undefined for constants
            scores |= {
                "pearson": stats.pearsonr(values, labels).statistic,
                "spearman": stats.spearmanr(values, labels).statistic,
            }
        return scores


METRICS: dict[str, type[_OfLogits]] = {
    "single_label_classification": SingleLabelMetrics,
    "multi_label_classification": MultiLabelMetrics,
    "regression": RegressionMetrics,
}


def compute(problem_type: str, logits: Array, labels: Array) -> dict[str, float]:
    """The same metrics as `METRICS[problem_type]().compute`.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs) logits.
        labels: (examples,) class indices, (examples, classes) of 0 and 1, or (examples,) values.
    """
    return {k: float(v) for k, v in METRICS[problem_type].of(logits, labels).items()}


def baseline(problem_type: str, train: Array, held_out: Array, num_labels: int) -> dict[str, float]:
    """Metrics of a constant prediction, which ignores the input.

    It predicts the most frequent class of the training set, the labels that more than half of its examples have, or its
    mean. Metrics of ranking and calibration are left out, because they are meaningless for a constant.

    Args:
        problem_type: as in `transformers` configurations.
        train: labels of the training examples.
        held_out: labels of the evaluated examples.
        num_labels: number of outputs of the model.
    """
    kept: tuple[str, ...]
    if problem_type == "regression":
        constant, kept = np.full((1, 1), train.mean()), ("mae", "rmse")
    elif problem_type == "multi_label_classification":
        constant, kept = 2.0 * (train.mean(axis=0) > 0.5)[None] - 1, ("f1_macro", "f1_micro", "accuracy")
    else:
        constant = np.eye(num_labels)[[np.bincount(train, minlength=num_labels).argmax()]]
        kept = ("accuracy", "f1_macro", "precision_macro", "recall_macro", "mcc")
    scores = compute(problem_type, constant.repeat(len(held_out), axis=0), held_out)
    return {name: scores[name] for name in kept}


def confusion(problem_type: str, logits: Array, labels: Array) -> list[list[int]]:
    """Confusion counts.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, classes) logits.
        labels: (examples,) class indices, or (examples, classes) of 0 and 1.

    Returns:
        For single-label classification the confusion matrix, (true class, predicted class). For multi-label
        classification (classes, 3): true positives, false positives and false negatives. Empty for regression.
    """
    if problem_type == "single_label_classification":
        table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(logits.shape[-1]))
    elif problem_type == "multi_label_classification":
        predicted, true = logits > 0, labels > 0
        table = np.stack([(predicted & true).sum(0), (predicted & ~true).sum(0), (~predicted & true).sum(0)], axis=1)
    else:
        return []
    return table.tolist()


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
    for z, y in zip(logits.T.astype(np.float64), labels.T, strict=True):
        order = np.argsort(-z, kind="stable")
        z, y = z[order], y[order]
        true_positives, positives = np.cumsum(y), np.arange(1, len(y) + 1)
        f1 = 2 * true_positives / (positives + y.sum())
        f1[:-1][z[:-1] == z[1:]] = -1.0  # no threshold separates equal logits
        best = int(f1.argmax())
        probability = expit(z)
        below = probability[best + 1] if best + 1 < len(y) else 0.0
        enough = least <= y.sum() <= len(y) - least and np.isfinite(z).all()
        thresholds.append(float((probability[best] + below) / 2) if enough else 0.5)
    return thresholds


def names(problem_type: str, num_labels: int) -> tuple[str, ...]:
    """Names of the metrics of a problem type."""
    if problem_type == "regression":
        return tuple(RegressionMetrics.of(np.array([[1.0], [2.0]]), np.array([1.0, 2.0])))
    labels = np.eye(num_labels)[:2] if problem_type == "multi_label_classification" else np.arange(2) % num_labels
    return tuple(METRICS[problem_type].of(np.eye(num_labels)[:2], labels))


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


def _confidence(logits: Array, labels: Array) -> tuple[Array, Array]:
    return softmax(logits.astype(np.float64), axis=-1).max(-1), (logits.argmax(-1) == labels).astype(float)


def _in_top(logits: Array, labels: Array) -> Array:
    """Whether the true class is among the five with the highest logits, (examples,); ties are broken by index."""
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = np.arange(logits.shape[-1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1) < TOP


def intervals(problem_type: str, logits: Array, labels: Array, seed: int = 0) -> dict[str, list[float]]:
    """95% confidence interval of each metric.

    Wilson's score interval (Wilson 1927) for accuracies, the percentile bootstrap for all others (Efron and Tibshirani
    1993, chapter 13). The intervals account for the sampling of held-out examples, not for the variation between
    training seeds.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs) logits.
        labels: as in `compute`.
        seed: seed of the bootstrap.

    Returns:
        [low, high] by metric.
    """
    rng = np.random.default_rng(seed)
    bounds: dict[str, list[float]] = {}
    if problem_type == "single_label_classification":
        # Resampling examples is equivalent to a multinomial draw over the cells of the confusion matrix, which avoids
        # calling scikit-learn a thousand times.
        table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(logits.shape[-1]))
        draws = rng.multinomial(len(labels), table.ravel() / len(labels), BOOTSTRAP_SAMPLES)
        samples = from_confusion(draws.reshape(BOOTSTRAP_SAMPLES, *table.shape))
        confidence, correct = _confidence(logits, labels)
        resampled = (rng.integers(0, len(labels), len(labels)) for _ in range(SLOW_BOOTSTRAP_SAMPLES))
        samples["ece"] = np.array([calibration_error(confidence[i], correct[i]) for i in resampled])
        # Without any errors, no bootstrap sample has one, and the interval of the accuracy would be [1, 1].
        samples.pop("accuracy")
        bounds["accuracy"] = _wilson(np.trace(table), len(labels))
        if logits.shape[-1] > TOP:
            bounds["top_5_accuracy"] = _wilson(_in_top(logits, labels).sum(), len(labels))
    else:
        indices = rng.integers(0, len(labels), (SLOW_BOOTSTRAP_SAMPLES, len(labels)))
        scores = [compute(problem_type, logits[i], labels[i]) for i in indices]
        samples = {name: np.array([s[name] for s in scores if name in s]) for name in scores[0]}
    tail = 100 * (1 - CONFIDENCE) / 2
    quantiles = {name: np.percentile(values, [tail, 100 - tail]) for name, values in samples.items()}
    return bounds | {name: [float(low), float(high)] for name, (low, high) in quantiles.items()}


def _wilson(hits: Any, count: int) -> list[float]:
    low, high = stats.binomtest(int(hits), count).proportion_ci(CONFIDENCE, method="wilson")
    return [float(low), float(high)]


def from_confusion(table: Array) -> dict[str, Array]:
    """Single-label metrics of confusion matrices, as defined by scikit-learn.

    Macro averages are over the classes that occur as a label or a prediction. MCC: Gorodkin 2004, equation 8.

    Args:
        table: (..., true class, predicted class) counts.

    Returns:
        (...) values by metric.
    """
    table = table.astype(float)
    total, hits = table.sum((-2, -1)), np.diagonal(table, axis1=-2, axis2=-1)
    true, predicted = table.sum(-1), table.sum(-2)
    occurs = true + predicted > 0
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, true, out=np.zeros_like(hits), where=true > 0)
    f1 = np.divide(2 * hits, true + predicted, out=np.zeros_like(hits), where=occurs)
    correct = hits.sum(-1)
    deviation = np.sqrt((total**2 - (predicted**2).sum(-1)) * (total**2 - (true**2).sum(-1)))
    covariance = correct * total - (true * predicted).sum(-1)
    return {
        "accuracy": correct / total,
        "f1_macro": f1.sum(-1) / occurs.sum(-1),
        "precision_macro": precision.sum(-1) / occurs.sum(-1),
        "recall_macro": recall.sum(-1) / occurs.sum(-1),
        "mcc": np.divide(covariance, deviation, out=np.zeros_like(covariance), where=deviation > 0),
    }
