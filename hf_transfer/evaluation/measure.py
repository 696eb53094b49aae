"""Logits of a held-out split to metrics, with tuned thresholds and the form they are printed in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import logit
from transformers import EvalPrediction, Trainer

from hf_transfer.evaluation import metrics

THRESHOLD = 0.5  # of a label's probability


# ---- metrics, as training and evaluation share them ----------------------------------------------------------------


def thresholds_of(config: Any) -> list[float]:
    """Each label's threshold, where they were tuned; else none."""
    known = getattr(config, "label_thresholds", None) or {}
    return [known[str(config.id2label[i])] for i in sorted(config.id2label)] if known else []


def tune_thresholds(trainer: Trainer, validation: Dataset) -> None:
    """Choose each label's threshold on the validation split, and note it in the model's configuration."""
    prediction = trainer.predict(validation)
    found = metrics.best_thresholds(_logits(prediction.predictions), prediction.label_ids)
    config = trainer.model.config
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    config.label_thresholds = dict(zip(names, found, strict=True))


def metrics_of(problem_type: str, prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a Trainer."""
    return metrics.compute(problem_type, _logits(prediction.predictions), prediction.label_ids)


def _logits(predictions: Any) -> Any:
    return predictions[0] if isinstance(predictions, tuple) else predictions  # some models return hidden states too


def held_out_metrics(trainer: Trainer, prepared: Dataset, problem_type: str) -> dict[str, Any]:
    """`{"metrics", "intervals", "confusion", "num_examples"}` of a Trainer's model on prepared examples."""
    prediction = trainer.predict(prepared)
    logits, found = _logits(prediction.predictions), without_speed(prediction.metrics, "test_")
    return _measured(problem_type, found, logits, prediction.label_ids, thresholds_of(trainer.model.config))


def _measured(problem_type: str, found: dict[str, float], logits: Any, labels: Any, limits: Sequence[float]) -> Any:
    """The metrics `found`, where labels have thresholds those with them, and their intervals."""
    if limits:
        logits = logits - logit(np.array(limits))  # 0 is where a label begins; ranks within a label stay
        found = found | metrics.compute(problem_type, logits, labels)
    return {
        "metrics": found,
        "intervals": metrics.intervals(problem_type, logits, labels),
        "confusion": metrics.confusion(problem_type, logits, labels),
        "num_examples": len(labels),
    }


def without_speed(values: dict[str, Any], prefix: str) -> dict[str, float]:
    """A Trainer's metrics without its prefix and without how long it took."""
    hidden = ("runtime", "per_second", "epoch", "preparation_time")
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix) and not k.endswith(hidden)}


def finite(value: Any) -> Any:
    """`value` with null for what JSON has no number for: a loss that diverged."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_metrics(found: dict[str, float], intervals: dict[str, list[float]]) -> Iterator[str]:
    """A line per metric, with its interval where there is one."""
    for name, value in found.items():
        low, high = intervals.get(name, (None, None))
        yield f"  {name:<16} {value:.4f}" + (f"   95% interval {low:.4f} to {high:.4f}" if low is not None else "")
