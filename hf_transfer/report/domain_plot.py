"""Two domains in a plane, before and after adaptation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

Points = Any  # (examples, 2)


def draw(panels: Mapping[str, tuple[Points, Points, Sequence[float]]]) -> bytes:
    """A panel for each plane, as PNG.

    Args:
        panels: by title, (points of the source, points of the target, share of the variance in each direction).
    """
    import matplotlib  # slow to import, and every run imports this module

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, row = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), layout="constrained", squeeze=False)
    for axes, (title, (source, target, shares)) in zip(row[0], panels.items(), strict=True):
        for points, name, marker in ((source, "source", "o"), (target, "target", "^")):
            axes.scatter(points[:, 0], points[:, 1], s=12, alpha=0.6, marker=marker, linewidths=0, label=name)
        for number, share in enumerate(shares):
            label = f"principal component {number + 1} ({share:.0%} of the variance)"
            (axes.set_ylabel if number else axes.set_xlabel)(label, fontsize=9)
        axes.set_title(title, fontsize=10)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    row[0][0].legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
    return file.getvalue()
