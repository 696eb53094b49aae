"""What `evaluate` measures beyond the metrics, as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_transfer.errors import shortened
from hf_transfer.evaluation.metric_table import LEADING, LOSS

MOST_CLASSES = 20  # that are shown
_WIDTH = 24  # of a name


def format_classes(per_class: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line per class; of many classes those with the lowest F1.

    Args:
        per_class: of `by_class.with_intervals`.
    """
    if not per_class:
        return
    shown, head = list(per_class), "Classes"
    if len(shown) > MOST_CLASSES:
        occurring = [one for one in shown if one["support"]]
        shown = sorted(occurring, key=lambda one: one["f1"])[:MOST_CLASSES]
        head = f"The {len(shown)} of {len(per_class):,} classes with the lowest F1"
    width = _width(one["label"] for one in shown)
    yield f"{head} (95% CI of F1):"
    yield f"  {'':<{width}} {'examples':>9} {'precision':>9} {'recall':>9} {'f1':>9}"
    for one in shown:
        values = " ".join(f"{_number(one[name]):>9}" for name in ("precision", "recall", "f1"))
        label = shortened(one["label"], _WIDTH)
        yield f"  {label:<{width}} {one['support']:>9,} {values}{_interval(one['intervals'].get('f1'))}"


def format_calibration(calibration: Mapping[str, Any]) -> Iterator[str]:
    """One line; none where nothing is known.

    Args:
        calibration: of `diagnostics.calibration_of`.
    """
    if not calibration:
        return
    confidence, accuracy = calibration["confidence"], calibration["accuracy"]
    gap = confidence - accuracy
    tendency = "overconfident" if gap > 0 else "underconfident"
    said = f"{tendency} by {abs(gap):.4f} on average" if gap else "neither over- nor underconfident on average"
    yield (
        f"Calibration: ECE {calibration['ece']:.4f}; mean probability {confidence:.4f}, right {accuracy:.4f} of the "
        f"time ({said})."
    )


def format_groups(column: str, groups: Sequence[Mapping[str, Any]], problem_type: str) -> Iterator[str]:
    """A line per value of a column, with the problem type's leading metric.

    Args:
        column: its name.
        groups: of `subgroups.measure_groups`.
        problem_type: as in `transformers` configurations.
    """
    metric = next(name for name in LEADING[problem_type] if name != LOSS)
    names = ["(missing)" if one["value"] is None else str(one["value"]) for one in groups]
    width = _width(names)
    yield f"By {column}:"
    yield f"  {'':<{width}} {'examples':>9} {metric:>9}"
    for name, one in zip(names, groups, strict=True):
        value, bounds = _number(one["metrics"].get(metric)), _interval(one["intervals"].get(metric))
        yield f"  {shortened(name, _WIDTH):<{width}} {one['num_examples']:>9,} {value:>9}{bounds}"


def format_robustness(robustness: Mapping[str, Any]) -> Iterator[str]:
    """A line per corruption, with the leading metric at each severity.

    Args:
        robustness: of `inference.robustness.measure_robustness`.
    """
    metric = robustness["metric"]
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for cell in robustness["corruptions"]:
        rows.setdefault(cell["name"], []).append(cell)
    width = _width(rows)
    yield (
        f"Robustness ({metric} by severity of the corruption; {robustness['clean']:.4f} without, mean "
        f"{robustness['mean']:.4f}):"
    )
    yield f"  {'':<{width}} " + " ".join(f"{cell['severity']:>9}" for cell in next(iter(rows.values())))
    for name, cells in rows.items():
        values = " ".join(f"{_number(cell['metrics'].get(metric)):>9}" for cell in cells)
        unchanged = 1 - cells[-1]["changed"]
        note = f"   {unchanged:.0%} of the examples unchanged even so" if unchanged >= 0.01 else ""
        yield f"  {name:<{width}} {values}{note}"


def format_separations(ood: Mapping[str, Any]) -> Iterator[str]:
    """A line per out-of-distribution score.

    Args:
        ood: of `evaluate` with `ood_data`.
    """
    compared = f"; distances to {ood['num_training']:,} training examples" if ood["num_training"] else ""
    yield (
        f"Out of distribution: {ood['num_outside']:,} examples of {ood['data']} ({ood['split']}) against "
        f"{ood['num_inside']:,} measured ones{compared}:"
    )
    for name, found in ood["scores"].items():
        line = f"  {name:<16} AUROC {found['auroc']:.4f}{_interval(found['interval'])}"
        yield f"{line}   accepted with 95% of the measured {found['fpr95']:.4f}"


def _width(names: Iterable[str]) -> int:
    return max(len(shortened(name, _WIDTH)) for name in names)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"   95% CI {bounds[0]:.4f} to {bounds[1]:.4f}"
