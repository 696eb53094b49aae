"""The metrics by name: for which problem types, and whether greater or smaller is better.

The one place that says so: the best checkpoint, plateaus, early stopping and the choice of a head read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL

LOSS = "loss"
TOP = 5


@dataclass(frozen=True)
class Metric:
    """What is known about a metric.

    Attributes:
        name: in `results.json` and, after `eval_`, in the log.
        greater_is_better: its direction.
        problem_types: that it is computed for, as in `transformers` configurations.
        above: number of outputs that the model must exceed.
        of_constants: whether it means anything for a prediction that ignores the input.
    """

    name: str
    greater_is_better: bool
    problem_types: tuple[str, ...]
    above: int = 0
    of_constants: bool = False


_METRICS = (
    Metric(LOSS, False, (SINGLE_LABEL, MULTI_LABEL, REGRESSION)),
    Metric("accuracy", True, (SINGLE_LABEL, MULTI_LABEL), of_constants=True),
    Metric("f1_macro", True, (SINGLE_LABEL, MULTI_LABEL), of_constants=True),
    Metric("f1_micro", True, (MULTI_LABEL,), of_constants=True),
    Metric("precision_macro", True, (SINGLE_LABEL,), of_constants=True),
    Metric("recall_macro", True, (SINGLE_LABEL,), of_constants=True),
    Metric("mcc", True, (SINGLE_LABEL,), of_constants=True),
    Metric("ece", False, (SINGLE_LABEL,)),
    Metric("top_5_accuracy", True, (SINGLE_LABEL,), above=TOP),
    Metric("map", True, (MULTI_LABEL,)),
    Metric("mae", False, (REGRESSION,), of_constants=True),
    Metric("rmse", False, (REGRESSION,), of_constants=True),
    Metric("pearson", True, (REGRESSION,)),
    Metric("spearman", True, (REGRESSION,)),
)
METRIC_TABLE = {metric.name: metric for metric in _METRICS}
# What a person is shown while training; by the first, a run is compared with the baseline and with itself.
LEADING: dict[str, tuple[str, ...]] = {
    SINGLE_LABEL: ("accuracy", LOSS),
    MULTI_LABEL: ("f1_micro", LOSS),
    REGRESSION: ("rmse", "mae"),
}


def names(problem_type: str, num_labels: int) -> tuple[str, ...]:
    """Names of the metrics of a problem type and a number of outputs, without the loss."""
    return tuple(
        m.name for m in _METRICS if m.name != LOSS and problem_type in m.problem_types and num_labels > m.above
    )


def greater_is_better(name: str) -> bool | None:
    """The direction of a metric, with or without `eval_`; None if it is not one of these."""
    metric = METRIC_TABLE.get(name.removeprefix("eval_"))
    return None if metric is None else metric.greater_is_better
