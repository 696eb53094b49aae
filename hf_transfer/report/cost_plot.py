"""What the rows of a comparison reach and what they cost, as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """A row.

    Attributes:
        name: of the row.
        cost: on the horizontal axis.
        value: on the vertical axis.
        interval: of the value, [low, high]; None without one.
    """

    name: str
    cost: float
    value: float
    interval: tuple[float, float] | None = None


def draw(points: Sequence[Point], along: str, metric: str, mark: str = "") -> bytes:
    """The figure, as PNG.

    Args:
        points: of the rows.
        along: name of the horizontal axis.
        metric: name of the vertical axis.
        mark: name of the row to mark.
    """
    numbers = [str(number) for number in range(1, len(points) + 1)]
    drawn = figure(points, numbers, along, metric, mark, size=(8, 5 + 0.18 * len(points)))
    drawn.legend(loc="outside lower left", frameon=False, fontsize=8)
    file = io.BytesIO()
    drawn.savefig(file, dpi=150, format="png")
    return file.getvalue()


def figure(
    points: Sequence[Point], numbers: Sequence[str], along: str, metric: str, mark: str, size: tuple[float, float]
) -> Any:
    """The figure, without a legend.

    Args:
        points: as of `draw`.
        numbers: of the rows, next to their points.
        along: likewise.
        metric: likewise.
        mark: likewise.
        size: in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for place, (number, point) in enumerate(zip(numbers, points, strict=True)):
        bars = (
            None if point.interval is None else [[point.value - point.interval[0]], [point.interval[1] - point.value]]
        )
        style = "*" if point.name == mark else "o"
        width = 13 if point.name == mark else 7
        axes.errorbar(
            point.cost,
            point.value,
            yerr=bars,
            fmt=style,
            markersize=width,
            capsize=3,
            color=f"C{place % 10}",
            label=f"{number}  {point.name}",
        )
        axes.annotate(number, (point.cost, point.value), xytext=(6, 6), textcoords="offset points", fontsize=9)
    costs = [point.cost for point in points if point.cost > 0]
    if costs and max(costs) > 10 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel(along)
    axes.set_ylabel(metric)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
