"""Metrics of a set of predictions, and how sure they are.

Each problem type has one `evaluate.Metric` over scikit-learn's functions, made here: `evaluate.load` asks a hub and
runs code that it finds in the working directory. `compute` gives the same numbers from arrays, without files;
the training loop uses that.
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
SLOW_BOOTSTRAP_SAMPLES = 200  # where each one is a call of scikit-learn
CONFIDENCE = 0.95
CALIBRATION_BINS = 15  # as in Guo et al. 2017
TOP = 5


class _OfLogits(evaluate.Metric, ABC):
    """All metrics of a problem type. `predictions` are logits, so that ranking and calibration can be measured too."""

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
        found = self.of(np.asarray(predictions), np.asarray(references))
        return {k: float(v) for k, v in found.items()}

    @staticmethod
    @abstractmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        """The metrics by name."""


class SingleLabelMetrics(_OfLogits):
    """Accuracy, macro F1, precision and recall, MCC, expected calibration error; top-5 with more than five classes.

    predictions: (examples, classes) logits. references: (examples,) class indices.
    """

    description = "Metrics of a classification into one of several classes."
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
    """Macro and micro F1 at a probability of one half, exact matches, and mean average precision.

    predictions: (examples, labels) logits. references: (examples, labels) of 0 and 1.
    """

    description = "Metrics of a classification into any number of labels."
    references = Sequence(Value("float64"))

    @staticmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        predicted, present = (logits > 0).astype(int), labels.any(axis=0)
        scores = {
            "f1_macro": sk.f1_score(labels, predicted, average="macro", zero_division=0),
            "f1_micro": sk.f1_score(labels, predicted, average="micro", zero_division=0),
            "accuracy": sk.accuracy_score(labels, predicted),
        }
        if present.any() and np.isfinite(logits).all():  # a label that never occurs has no average precision
            scores["map"] = sk.average_precision_score(labels[:, present], logits[:, present], average="macro")
        return scores


class RegressionMetrics(_OfLogits):
    """Mean absolute and root mean squared error; Pearson's and Spearman's correlation unless one side is constant.

    predictions: (examples,) values. references: (examples,) values.
    """

    description = "Metrics of a regression."
    predictions = references = Value("float64")

    @staticmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        values = logits.reshape(labels.shape)
        scores = {
            "mae": np.abs(values - labels).mean(),  # scikit-learn refuses the NaN of a run that diverged
            "rmse": np.sqrt(np.square(values - labels).mean()),
        }
        if len(labels) > 1 and np.ptp(values) > 0 and np.ptp(labels) > 0:  # a constant correlates with nothing
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
    """Metrics by problem type: what `METRICS[problem_type]().compute` gives.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, labels).
        labels: (examples,) class indices; (examples, labels) of 0 and 1; (examples,) values.
    """
    return {k: float(v) for k, v in METRICS[problem_type].of(logits, labels).items()}


def baseline(problem_type: str, train: Array, held_out: Array, num_labels: int) -> dict[str, float]:
    """The metrics of an answer that looks at no input: the training set's largest class, the labels that more than half
    of its examples have, or its mean. Only those that such an answer has: a constant ranks nothing and is never sure.

    Args:
        problem_type: as in `transformers` configurations.
        train: labels of the training examples.
        held_out: labels of the examples that the metrics are of.
        num_labels: outputs of the model.
    """
    kept: tuple[str, ...]
    if problem_type == "regression":
        answer, kept = np.full((1, 1), train.mean()), ("mae", "rmse")
    elif problem_type == "multi_label_classification":
        answer, kept = 2.0 * (train.mean(axis=0) > 0.5)[None] - 1, ("f1_macro", "f1_micro", "accuracy")
    else:
        answer = np.eye(num_labels)[[np.bincount(train, minlength=num_labels).argmax()]]
        kept = ("accuracy", "f1_macro", "precision_macro", "recall_macro", "mcc")
    found = compute(problem_type, answer.repeat(len(held_out), axis=0), held_out)
    return {name: found[name] for name in kept}


def confusion(problem_type: str, logits: Array, labels: Array) -> list[list[int]]:
    """What was taken for what: (true class, predicted class) counts; for several labels a row of (right, wrong, missed)
    for each label; nothing for a regression.
    """
    if problem_type == "single_label_classification":
        table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(logits.shape[-1]))
    elif problem_type == "multi_label_classification":
        said, true = logits > 0, labels > 0
        table = np.stack([(said & true).sum(0), (said & ~true).sum(0), (~said & true).sum(0)], axis=1)
    else:
        return []
    return table.tolist()


def best_thresholds(logits: Array, labels: Array, least: int = 5) -> list[float]:
    """The probability from which on each label is best said to be there: the one of the highest F1.

    Halfway between two neighbouring probabilities; one half where a label has fewer than `least` positives or
    negatives, of which little can be learnt.

    Args:
        logits: (examples, labels).
        labels: (examples, labels) of 0 and 1.
        least: positives, and negatives, that a label needs.
    """
    found = []
    for z, y in zip(logits.T.astype(np.float64), labels.T, strict=True):
        order = np.argsort(-z, kind="stable")
        z, y = z[order], y[order]
        hits, said = np.cumsum(y), np.arange(1, len(y) + 1)
        f1 = 2 * hits / (said + y.sum())
        f1[:-1][z[:-1] == z[1:]] = -1.0  # no threshold parts what is equal
        best = int(f1.argmax())
        probability = expit(z)
        below = probability[best + 1] if best + 1 < len(y) else 0.0
        enough = least <= y.sum() <= len(y) - least and np.isfinite(z).all()
        found.append(float((probability[best] + below) / 2) if enough else 0.5)
    return found


def names(problem_type: str, num_labels: int) -> tuple[str, ...]:
    """The metrics of a problem type."""
    if problem_type == "regression":
        return tuple(RegressionMetrics.of(np.array([[1.0], [2.0]]), np.array([1.0, 2.0])))
    labels = np.eye(num_labels)[:2] if problem_type == "multi_label_classification" else np.arange(2) % num_labels
    return tuple(METRICS[problem_type].of(np.eye(num_labels)[:2], labels))


def calibration_error(confidence: Array, correct: Array) -> Array:
    """Expected calibration error: the mean distance between confidence and accuracy over equal bins of confidence
    (Guo et al. 2017, equation 3).

    Args:
        confidence: (..., examples), each in 0 to 1.
        correct: (..., examples) of 0 and 1.
    """
    confidence = np.nan_to_num(confidence)  # of a run that diverged
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [np.abs(((correct - confidence) * (bins == b)).sum(-1)) for b in range(CALIBRATION_BINS)]
    return np.sum(gaps, axis=0) / confidence.shape[-1]


def _confidence(logits: Array, labels: Array) -> tuple[Array, Array]:
    return softmax(logits.astype(np.float64), axis=-1).max(-1), (logits.argmax(-1) == labels).astype(float)


def _in_top(logits: Array, labels: Array) -> Array:
    """Whether fewer than five classes rank before the true one: higher, or equal and earlier."""
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = np.arange(logits.shape[-1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1) < TOP


def intervals(problem_type: str, logits: Array, labels: Array, seed: int = 0) -> dict[str, list[float]]:
    """95% interval of each metric: Wilson's (1927) for an accuracy, the percentile bootstrap for the others (Efron and
    Tibshirani 1993, chapter 13).

    Over the held-out examples; says nothing of the spread between training seeds.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    if problem_type == "single_label_classification":
        # A resample of examples is a multinomial draw over the cells of the confusion matrix: the same distribution,
        # without calling scikit-learn a thousand times.
        table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(logits.shape[-1]))
        draws = rng.multinomial(len(labels), table.ravel() / len(labels), BOOTSTRAP_SAMPLES)
        samples = from_confusion(draws.reshape(BOOTSTRAP_SAMPLES, *table.shape))
        confidence, correct = _confidence(logits, labels)
        resampled = (rng.integers(0, len(labels), len(labels)) for _ in range(SLOW_BOOTSTRAP_SAMPLES))
        samples["ece"] = np.array([calibration_error(confidence[i], correct[i]) for i in resampled])
        # No resample of a faultless test has a fault: the bootstrap would be certain of an accuracy of 1.
        samples.pop("accuracy")
        found["accuracy"] = _wilson(np.trace(table), len(labels))
        if logits.shape[-1] > TOP:
            found["top_5_accuracy"] = _wilson(_in_top(logits, labels).sum(), len(labels))
    else:
        indices = rng.integers(0, len(labels), (SLOW_BOOTSTRAP_SAMPLES, len(labels)))
        drawn = [compute(problem_type, logits[i], labels[i]) for i in indices]
        samples = {name: np.array([d[name] for d in drawn if name in d]) for name in drawn[0]}
    tail = 100 * (1 - CONFIDENCE) / 2
    quantiles = {name: np.percentile(values, [tail, 100 - tail]) for name, values in samples.items()}
    return found | {name: [float(low), float(high)] for name, (low, high) in quantiles.items()}


def _wilson(hits: Any, count: int) -> list[float]:
    low, high = stats.binomtest(int(hits), count).proportion_ci(CONFIDENCE, method="wilson")
    return [float(low), float(high)]


def from_confusion(table: Array) -> dict[str, Array]:
    """The single-label metrics of confusion matrices (..., true class, predicted class), as scikit-learn defines them.

    Macro averages are over the classes that occur as a label or a prediction; MCC is Gorodkin's (2004), equation 8.
    """
    table = table.astype(float)
    total, hits = table.sum((-2, -1)), np.diagonal(table, axis1=-2, axis2=-1)
    true, predicted = table.sum(-1), table.sum(-2)
    occurs = true + predicted > 0
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, true, out=np.zeros_like(hits), where=true > 0)
    f1 = np.divide(2 * hits, true + predicted, out=np.zeros_like(hits), where=occurs)
    correct = hits.sum(-1)
    spread = np.sqrt((total**2 - (predicted**2).sum(-1)) * (total**2 - (true**2).sum(-1)))
    agreement = correct * total - (true * predicted).sum(-1)
    return {
        "accuracy": correct / total,
        "f1_macro": f1.sum(-1) / occurs.sum(-1),
        "precision_macro": precision.sum(-1) / occurs.sum(-1),
        "recall_macro": recall.sum(-1) / occurs.sum(-1),
        "mcc": np.divide(agreement, spread, out=np.zeros_like(agreement), where=spread > 0),
    }
