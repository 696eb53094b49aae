"""Metrics with confidence intervals, calibration and thresholds, as `evaluate.Metric` classes that work offline."""

from hf_transfer.evaluation.metrics import METRICS, MultiLabelMetrics, RegressionMetrics, SingleLabelMetrics, compute

__all__ = ["METRICS", "MultiLabelMetrics", "RegressionMetrics", "SingleLabelMetrics", "compute"]
