"""Evaluate a Trainer's model on a held-out split: metrics, tuned thresholds, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import logit
from transformers import EvalPrediction, Trainer

from hf_transfer.evaluation import metrics

THRESHOLD = 0.5  # default threshold on a label's probability


def thresholds_of(config: Any) -> list[float]:
    """The tuned threshold of each label, in the order of the logits; empty if they were not tuned."""
    by_name = getattr(config, "label_thresholds", None) or {}
    return [by_name[str(config.id2label[i])] for i in sorted(config.id2label)] if by_name else []


def tune_thresholds(trainer: Trainer, validation: Dataset) -> None:
    """Choose the threshold of each label on the validation split and store it in the model's configuration."""
    prediction = trainer.predict(validation)
    thresholds = metrics.best_thresholds(_logits(prediction.predictions), prediction.label_ids)
    config = trainer.model.config
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    config.label_thresholds = dict(zip(names, thresholds, strict=True))


def metrics_of(problem_type: str, prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a Trainer."""
    return metrics.compute(problem_type, _logits(prediction.predictions), prediction.label_ids)


def _logits(predictions: Any) -> Any:
    return predictions[0] if isinstance(predictions, tuple) else predictions  # some models return hidden states too


def held_out_metrics(trainer: Trainer, prepared: Dataset, problem_type: str) -> dict[str, Any]:
    """Evaluate a Trainer's model on prepared examples.

    Returns:
        A dict with `metrics`, `intervals` (95% confidence intervals), `confusion` (see `metrics.confusion`) and
        `num_examples`.
    """
    prediction = trainer.predict(prepared)
    logits, values = _logits(prediction.predictions), without_speed(prediction.metrics, "test_")
    return _measured(problem_type, values, logits, prediction.label_ids, thresholds_of(trainer.model.config))


def _measured(
    problem_type: str, values: dict[str, float], logits: Any, labels: Any, thresholds: Sequence[float]
) -> dict[str, Any]:
    """The metrics `values`, recomputed with tuned thresholds if there are any, and their confidence intervals."""
    if thresholds:
        logits = logits - logit(np.array(thresholds))  # moves the threshold to 0 and keeps the order within a label
        values = values | metrics.compute(problem_type, logits, labels)
    return {
        "metrics": values,
        "intervals": metrics.intervals(problem_type, logits, labels),
        "confusion": metrics.confusion(problem_type, logits, labels),
        "num_examples": len(labels),
    }


def without_speed(values: dict[str, Any], prefix: str) -> dict[str, float]:
    """A Trainer's metrics without their prefix, and without runtime and speed."""
    hidden = ("runtime", "per_second", "epoch", "preparation_time")
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix) and not k.endswith(hidden)}


def finite(value: Any) -> Any:
    """`value` with NaN and infinity replaced by None, since JSON cannot represent them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_metrics(values: dict[str, float], intervals: dict[str, list[float]]) -> Iterator[str]:
    """One line per metric, with its confidence interval if there is one."""
    for name, value in values.items():
        low, high = intervals.get(name, (None, None))
        yield f"  {name:<16} {value:.4f}" + (f"   95% CI {low:.4f} to {high:.4f}" if low is not None else "")
