"""Metrics of a set of predictions, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

Array = np.ndarray[Any, Any]
BOOTSTRAP_SAMPLES = 1000
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
    return {"accuracy": sk.accuracy_score(labels, predicted), "f1_macro": sk.f1_score(labels, predicted, **average),
            "precision_macro": sk.precision_score(labels, predicted, **average),
            "recall_macro": sk.recall_score(labels, predicted, **average),
            "mcc": sk.matthews_corrcoef(labels, predicted)}


def _multi_label(logits: Array, labels: Array) -> dict[str, Any]:
    predicted, present = (logits > 0).astype(int), labels.any(axis=0)
    scores = {"f1_macro": sk.f1_score(labels, predicted, average="macro", zero_division=0),
              "f1_micro": sk.f1_score(labels, predicted, average="micro", zero_division=0),
              "accuracy": sk.accuracy_score(labels, predicted)}
    if present.any():  # a label that never occurs has no average precision
        scores["map"] = sk.average_precision_score(labels[:, present], logits[:, present], average="macro")
    return scores


def _regression(logits: Array, labels: Array) -> dict[str, Any]:
    values, labels = logits.reshape(labels.shape), labels
    scores = {"mae": np.abs(values - labels).mean(), "rmse": np.sqrt(np.square(values - labels).mean())}
    if len(labels) > 1 and np.ptp(values) > 0 and np.ptp(labels) > 0:  # a constant correlates with nothing
        scores |= {"pearson": stats.pearsonr(values, labels).statistic,
                   "spearman": stats.spearmanr(values, labels).statistic}
    return scores


_METRICS: dict[str, Callable[[Array, Array], dict[str, Any]]] = {
    "single_label_classification": _single_label,
    "multi_label_classification": _multi_label,
    "regression": _regression,
}


def intervals(problem_type: str, logits: Array, labels: Array, seed: int = 0) -> dict[str, list[float]]:
    """95% percentile bootstrap interval of each metric (Efron and Tibshirani 1993, chapter 13).

    Resamples the test examples; says nothing of the spread between training seeds.
    """
    rng = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {}
    for _ in range(BOOTSTRAP_SAMPLES):
        index = rng.integers(0, len(labels), len(labels))
        for name, value in compute(problem_type, logits[index], labels[index]).items():
            samples.setdefault(name, []).append(value)
    tail = 100 * (1 - CONFIDENCE) / 2
    return {name: [float(v) for v in np.percentile(values, [tail, 100 - tail])] for name, values in samples.items()}
