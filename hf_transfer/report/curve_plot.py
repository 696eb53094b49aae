"""Curves of metrics as a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence


def draw(
    places: Sequence[float],
    series: Mapping[str, Sequence[float]],
    along: str,
    metric: str,
    mark: float | None = None,
) -> bytes:
    """The figure, as PNG.

    Args:
        places: of the points on the horizontal axis.
        series: values at these places, by name.
        along: name of the horizontal axis.
        metric: name of the vertical axis.
        mark: a place to mark.
    """
    import matplotlib  # slow to import, and every run imports this module

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, values in series.items():
        axes.plot(places, values, marker="o", linewidth=2, label=name)
    if mark is not None:
        axes.axvline(mark, color="0.5", linestyle="--", linewidth=1.5, label=f"{along} {mark:g}")
    axes.set_xlabel(along)
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
    return file.getvalue()
