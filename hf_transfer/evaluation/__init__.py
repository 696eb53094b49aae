"""Metrics with intervals, calibration and thresholds; `evaluate.Metric` classes that need no network."""

from hf_transfer.evaluation.metrics import METRICS, MultiLabelMetrics, RegressionMetrics, SingleLabelMetrics, compute

__all__ = ["METRICS", "MultiLabelMetrics", "RegressionMetrics", "SingleLabelMetrics", "compute"]
