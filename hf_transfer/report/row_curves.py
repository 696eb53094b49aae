"""How the rows of a comparison came to what they reach, epoch by epoch, as a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib


def draw(curves: Mapping[str, Mapping[int, float]], metric: str, mark: str = "") -> bytes:
    """The figure, as PNG.

    Args:
        curves: the metric by epoch, by name of the row, in the table's order.
        metric: name of the vertical axis.
        mark: name of the row to draw thicker.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(8, 5 + 0.18 * len(curves)), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(
            list(curve),
            list(curve.values()),
            marker="o",
            markersize=4,
            linewidth=2.6 if name == mark else 1.3,
            linestyle=("-", "--", ":")[number // 10 % 3],
            color=f"C{number % 10}",
            label=f"{number + 1}  {name}",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{metric} on validation")
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
    return file.getvalue()
