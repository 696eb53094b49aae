"""Whether a model is better than a prediction that ignores the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.metric_table import LEADING, METRIC_TABLE
from hf_transfer.evaluation.scores import Array

BETTER, UNCLEAR, WORSE = "better", "not significantly better", "worse"


def against_baseline(
    problem_type: str,
    names: Sequence[str],
    train: Array,
    held_out: Array,
    values: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The constant baseline of a run, and whether the model is better.

    Args:
        problem_type: as in `transformers` configurations.
        names: of the labels.
        train: labels of the training examples, see `metrics.baseline`.
        held_out: labels of the evaluated examples.
        values: the model's metrics on them.
        intervals: [low, high] by metric.

    Returns:
        `predicts` (the label, the labels or the value that the baseline always answers), its `metrics`, the metric
        that is `compared_by`, and the `verdict`, see `verdict`.
    """
    constant = metrics.baseline(problem_type, train, held_out, len(names))
    name = LEADING[problem_type][0]
    return {
        "predicts": _constant(problem_type, names, train),
        "metrics": constant,
        "compared_by": name,
        "verdict": verdict(name, constant, intervals),
    }


def _constant(problem_type: str, names: Sequence[str], train: Array) -> Any:
    if problem_type == REGRESSION:
        return float(train.mean())
    if problem_type == MULTI_LABEL:
        return [name for name, is_in in zip(names, metrics.constant_labels(train), strict=True) if is_in]
    return names[int(np.bincount(train, minlength=len(names)).argmax())]


def verdict(name: str, constant: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> str | None:
    """`better` or `worse` if the confidence interval of the metric excludes the baseline, else `not significantly
    better`; None without an interval or a baseline of this metric.
    """
    if name not in constant or name not in intervals:
        return None
    low, high = intervals[name]
    if not (np.isfinite(low) and np.isfinite(high)):  # a run that diverged
        return UNCLEAR
    if not METRIC_TABLE[name].greater_is_better:
        low, high, level = -high, -low, -constant[name]
    else:
        level = constant[name]
    return BETTER if low > level else WORSE if high < level else UNCLEAR
