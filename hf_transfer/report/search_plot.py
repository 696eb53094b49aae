"""What the trials of a search reach against the values that they were given, as a figure."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WIDE = 10  # a range over which the largest number is so many times the smallest is drawn logarithmically


@dataclass(frozen=True)
class Dot:
    """A trial.

    Attributes:
        settings: values by key.
        value: of the metric.
        is_stopped: whether it was stopped early; the value is then what it had reached.
        is_chosen: whether it is the best.
    """

    settings: Mapping[str, Any]
    value: float
    is_stopped: bool = False
    is_chosen: bool = False


def draw(dots: Sequence[Dot], metric: str) -> bytes:
    """The figure, as PNG: a panel for each key, in which every trial is a dot.

    Args:
        dots: of the trials, at least one, with the same keys.
        metric: name of the vertical axis.
    """
    file = io.BytesIO()
    figure(dots, metric).savefig(file, dpi=150, format="png")
    return file.getvalue()


def figure(dots: Sequence[Dot], metric: str) -> Any:
    """The figure.

    Args:
        dots: as of `draw`.
        metric: likewise.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    names = list(dots[0].settings)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        values = [dot.settings[name] for dot in dots]
        places, labels = _places(values)
        for place, dot in zip(places, dots, strict=True):
            axes.plot(
                place,
                dot.value,
                marker="*" if dot.is_chosen else "o",
                markersize=14 if dot.is_chosen else 6,
                color="C1" if dot.is_chosen else "C0",
                fillstyle="none" if dot.is_stopped else "full",
            )
        if labels:
            axes.set_xticks(range(len(labels)), labels)
            axes.margins(x=0.2)
        elif min(places) > 0 and max(places) > _WIDE * min(places):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif all(isinstance(value, int) for value in values):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(name)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel(metric)
    if any(dot.is_stopped for dot in dots):
        figure.suptitle("hollow: stopped early, at what it had reached", fontsize=9)
    return figure


def _places(values: Sequence[Any]) -> tuple[list[float], list[str]]:
    """(places along the axis, names of places; none for numbers)."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values], []
    texts = [str(value) for value in values]
    labels = sorted(set(texts))
    return [float(labels.index(text)) for text in texts], labels
