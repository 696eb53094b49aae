"""The metrics of each problem type as one `evaluate.Metric`, for whoever evaluates with that library.

They are defined here because `evaluate.load` downloads metrics from the hub and runs code from the working directory. A
run takes the same values from `metrics.compute`, and does not import `evaluate`, which imports all pipelines of
transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.scores import Array


class _OfLogits(evaluate.Metric, ABC):
    """All metrics of a problem type; `predictions` are logits, as required for ranking and calibration metrics."""

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
        values = self.of(np.asarray(predictions), np.asarray(references))
        return {k: float(v) for k, v in values.items()}

    @staticmethod
    @abstractmethod
    def of(logits: Array, labels: Array) -> dict[str, Any]:
        """The metrics by name, from arrays of logits and labels."""


class SingleLabelMetrics(_OfLogits):
    """Accuracy, macro F1, precision and recall, MCC, expected calibration error; top-5 accuracy with over five classes.

    predictions: (examples, classes) logits. references: (examples,) class indices.
    """

    description = "Metrics of single-label classification."
    references = Value("int64")
    of = staticmethod(scores.single_label)


class MultiLabelMetrics(_OfLogits):
    """Macro and micro F1 and subset accuracy at a probability of 0.5, and mean average precision.

    predictions: (examples, classes) logits. references: (examples, classes) of 0 and 1.
    """

    description = "Metrics of multi-label classification."
    references = Sequence(Value("float64"))
    of = staticmethod(scores.multi_label)


class RegressionMetrics(_OfLogits):
    """Mean absolute and root mean squared error; Pearson and Spearman correlation unless one side is constant.

    predictions: (examples,) values. references: (examples,) values.
    """

    description = "Metrics of regression."
    predictions = references = Value("float64")
    of = staticmethod(scores.regression)


METRICS: dict[str, type[_OfLogits]] = {
    SINGLE_LABEL: SingleLabelMetrics,
    MULTI_LABEL: MultiLabelMetrics,
    REGRESSION: RegressionMetrics,
}
