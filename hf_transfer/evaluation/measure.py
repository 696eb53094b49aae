"""Evaluate a Trainer's model on a held-out split: metrics, intervals, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import logit
from transformers import EvalPrediction, Trainer

from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.by_class import per_class
from hf_transfer.evaluation.metric_table import LOSS, METRIC_TABLE
from hf_transfer.evaluation.thresholds import logits_of, thresholds_of


def metrics_of(problem_type: str, prediction: EvalPrediction, decides: str | None = None) -> dict[str, float]:
    """`compute_metrics` of a Trainer.

    Args:
        problem_type: as in `transformers` configurations.
        prediction: logits and labels.
        decides: `metric_for_best_model`. Where it is undefined (a correlation of constant predictions), it is NaN,
            which is never the best; Trainer would end the run if it were missing.
    """
    values = metrics.compute(problem_type, logits_of(prediction.predictions), prediction.label_ids)
    name = (decides or "").removeprefix("eval_")
    if name in METRIC_TABLE and name != LOSS:
        values.setdefault(name, math.nan)
    return values


def held_out_metrics(trainer: Trainer, prepared: Dataset, problem_type: str) -> dict[str, Any]:
    """Evaluate a Trainer's model on prepared examples.

    Returns:
        A dict with `metrics`, `intervals` (95% confidence intervals), `confusion` (see `metrics.confusion`),
        `per_class` (see `by_class.per_class`), `num_examples`, and the arrays `logits` and `labels`.
    """
    prediction = trainer.predict(prepared)
    return metrics_of_prediction(trainer, without_speed(prediction.metrics, "test_"), prediction, problem_type)


def metrics_of_prediction(
    trainer: Trainer, values: dict[str, float], prediction: Any, problem_type: str
) -> dict[str, Any]:
    """What `held_out_metrics` returns, of logits and labels whose metrics `values` are known."""
    logits, labels = logits_of(prediction.predictions), prediction.label_ids
    results = measured(problem_type, values, logits, labels, thresholds_of(trainer.model.config))
    return {**results, "logits": logits, "labels": labels}


def measured(
    problem_type: str, values: dict[str, float], logits: Any, labels: Any, thresholds: Sequence[float]
) -> dict[str, Any]:
    """The metrics `values`, recomputed with tuned thresholds if there are any, and their confidence intervals."""
    limits = logit(np.array(thresholds)) if thresholds else 0.0
    if thresholds:
        values = values | metrics.compute(problem_type, logits, labels, limits)
    return {
        "metrics": values,
        "intervals": metrics.intervals(problem_type, logits, labels, limits=limits),
        "confusion": metrics.confusion(problem_type, logits, labels, limits),
        "per_class": per_class(problem_type, logits, labels, limits),
        "num_examples": len(labels),
    }


def without_speed(values: dict[str, Any], prefix: str) -> dict[str, float]:
    """A Trainer's metrics without their prefix, and without runtime and speed."""
    hidden = ("runtime", "per_second", "epoch", "preparation_time")
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix) and not k.endswith(hidden)}


def format_metrics(
    values: Mapping[str, float], intervals: Mapping[str, Sequence[float]], baseline: Mapping[str, float] | None = None
) -> Iterator[str]:
    """One line per metric, with its confidence interval and its baseline if there are any."""
    for name, value in values.items():
        low, high = intervals.get(name, (None, None))
        line = f"  {name:<16} {value:.4f}" + (f"   95% CI {low:.4f} to {high:.4f}" if low is not None else "")
        yield f"{line}   baseline {baseline[name]:.4f}" if baseline and name in baseline else line
