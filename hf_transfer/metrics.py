"""Metrics of a set of predictions, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

Array = np.ndarray[Any, Any]
BOOTSTRAP_SAMPLES = 1000
SLOW_BOOTSTRAP_SAMPLES = 200  # where each one is a call of scikit-learn
CONFIDENCE = 0.95


def compute(problem_type: str, logits: Array, labels: Array) -> dict[str, float]:
    """Metrics by problem type.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, labels).
        labels: (examples,) class indices; (examples, labels) of 0 and 1; (examples,) values.
    """
    return {k: float(v) for k, v in _METRICS[problem_type](logits, labels).items()}


def _single_label(logits: Array, labels: Array) -> dict[str, Any]:
    predicted = logits.argmax(-1)
    average = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": sk.accuracy_score(labels, predicted),
        "f1_macro": sk.f1_score(labels, predicted, **average),
        "precision_macro": sk.precision_score(labels, predicted, **average),
        "recall_macro": sk.recall_score(labels, predicted, **average),
        "mcc": sk.matthews_corrcoef(labels, predicted),
    }


def _multi_label(logits: Array, labels: Array) -> dict[str, Any]:
    predicted, present = (logits > 0).astype(int), labels.any(axis=0)
    scores = {
        "f1_macro": sk.f1_score(labels, predicted, average="macro", zero_division=0),
        "f1_micro": sk.f1_score(labels, predicted, average="micro", zero_division=0),
        "accuracy": sk.accuracy_score(labels, predicted),
    }
    if present.any():  # a label that never occurs has no average precision
        scores["map"] = sk.average_precision_score(labels[:, present], logits[:, present], average="macro")
    return scores


def _regression(logits: Array, labels: Array) -> dict[str, Any]:
    values, labels = logits.reshape(labels.shape), labels
    scores = {"mae": np.abs(values - labels).mean(), "rmse": np.sqrt(np.square(values - labels).mean())}
    if len(labels) > 1 and np.ptp(values) > 0 and np.ptp(labels) > 0:  # a constant correlates with nothing
        scores |= {
            "pearson": stats.pearsonr(values, labels).statistic,
            "spearman": stats.spearmanr(values, labels).statistic,
        }
    return scores


_METRICS: dict[str, Callable[[Array, Array], dict[str, Any]]] = {
    "single_label_classification": _single_label,
    "multi_label_classification": _multi_label,
    "regression": _regression,
}


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
        # No resample of a faultless test has a fault: the bootstrap would be certain of an accuracy of 1.
        samples.pop("accuracy")
        low, high = stats.binomtest(int(np.trace(table)), len(labels)).proportion_ci(CONFIDENCE, method="wilson")
        found["accuracy"] = [float(low), float(high)]
    else:
        indices = rng.integers(0, len(labels), (SLOW_BOOTSTRAP_SAMPLES, len(labels)))
        drawn = [compute(problem_type, logits[i], labels[i]) for i in indices]
        samples = {name: np.array([d[name] for d in drawn if name in d]) for name in drawn[0]}
    tail = 100 * (1 - CONFIDENCE) / 2
    quantiles = {name: np.percentile(values, [tail, 100 - tail]) for name, values in samples.items()}
    return found | {name: [float(low), float(high)] for name, (low, high) in quantiles.items()}


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
