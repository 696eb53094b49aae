"""How the rows of a comparison came to what they reach, epoch by epoch, as a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def draw(curves: Mapping[str, Mapping[int, float]], metric: str, mark: str = "") -> bytes:
    """The figure, as PNG.

    Args:
        curves: the metric by epoch, by name of the row, in the table's order.
        metric: name of the vertical axis.
        mark: name of the row to draw thicker.
    """
    named = {f"{number}  {name}": curve for number, (name, curve) in enumerate(curves.items(), 1)}
    marked = next((name for name, own in zip(named, curves, strict=True) if own == mark), "")
    drawn = figure(named, metric, marked, size=(8, 5 + 0.18 * len(curves)))
    drawn.legend(loc="outside lower left", frameon=False, fontsize=8)
    file = io.BytesIO()
    drawn.savefig(file, dpi=150, format="png")
    return file.getvalue()


def figure(curves: Mapping[str, Mapping[int, float]], metric: str, mark: str, size: tuple[float, float]) -> Any:
    """The figure, without a legend.

    Args:
        curves: as of `draw`.
        metric: likewise.
        mark: likewise.
        size: in inches.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes, colors = figure.subplots(), len(rcParams["axes.prop_cycle"])
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(
            list(curve),
            list(curve.values()),
            marker="o",
            markersize=4,
            linewidth=2.6 if name == mark else 1.3,
            linestyle=("-", "--", ":")[number // colors % 3],
            color=f"C{number % colors}",
            label=name,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{metric} on validation")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
