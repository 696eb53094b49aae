"""What the rows of a comparison reach and what they cost, as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib


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
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5 + 0.18 * len(points)), layout="constrained")
    for number, point in enumerate(points):
        bars = (
            None if point.interval is None else [[point.value - point.interval[0]], [point.interval[1] - point.value]]
        )
        style = "*" if point.name == mark else "o"
        size = 13 if point.name == mark else 7
        name = f"{number + 1}  {point.name}"
        axes.errorbar(
            point.cost,
            point.value,
            yerr=bars,
            fmt=style,
            markersize=size,
            capsize=3,
            color=f"C{number % 10}",
            label=name,
        )
        axes.annotate(str(number + 1), (point.cost, point.value), xytext=(6, 6), textcoords="offset points", fontsize=9)
    costs = [point.cost for point in points if point.cost > 0]
    if costs and max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    axes.margins(x=0.1, y=0.1)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    axes.set_xlabel(along)
    axes.set_ylabel(metric)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
    return file.getvalue()
