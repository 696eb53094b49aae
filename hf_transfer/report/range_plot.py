"""The curve of a learning-rate range test as a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence


def draw(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestions: Mapping[str, float],
    title: str,
) -> bytes:
    """The figure, as PNG.

    Args:
        rates: of each step.
        losses: likewise.
        smoothed: likewise.
        suggestions: learning rates to mark, by name.
        title: of the figure.
    """
    import matplotlib  # slow to import, and every run imports this module

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(rates, losses, color="0.8", linewidth=1, label="loss of the batch")
    axes.plot(rates, smoothed, color="C0", linewidth=2, label="smoothed")
    for number, (name, rate) in enumerate(suggestions.items(), start=1):
        axes.axvline(rate, color=f"C{number}", linestyle="--", linewidth=1.5, label=f"{name}: {rate:.1e}")
    low, high = min(smoothed), max(smoothed[: max(1, len(smoothed) // 2)])
    axes.set_ylim(low - 0.2 * (high - low or low or 1.0), high + 0.5 * (high - low or low or 1.0))  # not the divergence
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
    return file.getvalue()
