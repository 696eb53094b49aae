"""Metrics with confidence intervals, calibration and thresholds, as `evaluate.Metric` classes that work offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_transfer.evaluation.evaluate_metrics import (
        METRICS,
        MultiLabelMetrics,
        RegressionMetrics,
        SingleLabelMetrics,
    )
    from hf_transfer.evaluation.metrics import compute

__all__ = ["METRICS", "MultiLabelMetrics", "RegressionMetrics", "SingleLabelMetrics", "compute"]


def __getattr__(name: str) -> Any:
    """Import a metric when it is first used: whoever asks for a metric's direction must not wait for scikit-learn."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "metrics" if name == "compute" else "evaluate_metrics"
    return getattr(import_module(f"{__name__}.{home}"), name)
