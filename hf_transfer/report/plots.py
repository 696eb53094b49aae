"""The drawings of a report. Each makes a matplotlib figure; `figures.svg` and `figures.png` say in which colors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_transfer.errors import shortened
from hf_transfer.report.figures import HEIGHT, WIDTH, new

_LOWEST = 1e-3  # of the color scale of learning rates, relative to the highest
_NAME = 24  # characters of a label
_MOST_NUMBERS = 20  # classes of a matrix whose cells show their number


def reliability(curves: Mapping[str, Mapping[str, Sequence[Any]]], along: str, metric: str) -> Any:
    """How often answers are right, by confidence; the diagonal is a calibrated model.

    Args:
        curves: by name, see `evaluation.diagnostics.reliability`.
        along: name of the horizontal axis.
        metric: name of the vertical axis.
    """
    figure, axes = new()
    axes.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1)
    for name, bins in curves.items():
        points = [p for p in zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True) if p[2]]
        x, y, counts = zip(*points, strict=True)
        (line,) = axes.plot(x, y, linewidth=1.5, label=name)
        sizes = 8 + 120 * np.sqrt(np.array(counts) / max(1, sum(counts)))
        axes.scatter(x, y, s=sizes, color=line.get_color(), alpha=0.75, linewidths=0)
    axes.set(xlabel=along, ylabel=metric, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend()
    return figure


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    along: str,
    metric: str,
    mark: float | None = None,
) -> Any:
    """Lines over common places.

    Args:
        x: the places.
        series: values there by name, NaN where None.
        along: name of the horizontal axis.
        metric: name of the vertical axis.
        mark: a place to mark.
    """
    figure, axes = new()
    for name, values in series.items():
        axes.plot(x, [np.nan if v is None else v for v in values], linewidth=1.5, label=shortened(name, _NAME))
    if mark is not None:
        axes.axvline(mark, color="0.5", linestyle=":", linewidth=1)
    axes.set(xlabel=along, ylabel=metric)
    if len(series) > 1:
        axes.legend()
    return figure


def values(points: Sequence[Sequence[float]]) -> Any:
    """Predicted against true values of a regression."""
    figure, axes = new()
    true, predicted = np.array(points, dtype=float).T
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    axes.plot([low, high], [low, high], color="0.5", linestyle=":", linewidth=1)
    axes.scatter(true, predicted, s=10, alpha=0.6, linewidths=0)
    axes.set(xlabel="true value", ylabel="predicted value")
    return figure


@dataclass(frozen=True)
class RateMap:
    """Learning rates that a run had, by layer group and step.

    Attributes:
        groups: names, input to head.
        rates: (groups, columns) learning rates, 0 where frozen; the columns are equal parts of the run.
        steps: of the run.
        stages: (first step, name) of each stage.
    """

    groups: Sequence[str]
    rates: Sequence[Sequence[float]]
    steps: int
    stages: Sequence[tuple[int, str]]


def rate_map(found: RateMap) -> Any:
    """Layer groups from bottom to top, steps from left to right, learning rates as color; nothing where frozen."""
    from matplotlib.colors import LogNorm

    count = len(found.groups)
    figure, axes = new(WIDTH, min(9.0, max(HEIGHT, 0.9 + 0.19 * count)))
    rates = np.ma.masked_less_equal(np.array(found.rates, dtype=float), 0)
    high = float(rates.max()) if rates.count() else 1.0
    low = max(float(rates.min()) if rates.count() else high, high * _LOWEST)
    norm = LogNorm(low / 1.01, high * 1.01)
    axes.set_facecolor("0.6")
    axes.patch.set_alpha(0.35)
    drawn = axes.imshow(
        rates.clip(low),
        aspect="auto",
        origin="lower",
        extent=(0, found.steps, -0.5, count - 0.5),
        norm=norm,
        cmap="viridis",
    )
    for number, (start, name) in enumerate(found.stages):
        if number:
            axes.axvline(start, color="0.5", linewidth=1)
        axes.annotate(
            shortened(name, 14), (start, 1.0), (2, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=7, rotation=25 if len(found.stages) > 2 else 0,
        )  # fmt: skip
    every = max(1, -(-count // 36))
    axes.set_yticks(range(0, count, every), [shortened(n, _NAME) for n in found.groups[::every]], fontsize=7)
    axes.set_xlabel("optimizer step")
    bar = figure.colorbar(drawn, ax=axes, label="learning rate (gray: frozen)", pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
    bar.ax.yaxis.set_minor_formatter("")
    if high < 12 * low:  # no power of ten may be within
        bar.set_ticks([low, (low * high) ** 0.5, high] if high > 1.01 * low else [high])
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-"))
    return figure


def confusion(names: Sequence[str], counts: Any) -> Any:
    """A confusion matrix: rows true classes, columns predicted ones, the color by row.

    Args:
        names: of the classes.
        counts: (classes, classes).
    """
    table = np.array(counts, dtype=float)
    size = len(names)
    side = min(12.0, max(3.2, 1.6 + 0.34 * size))
    figure, axes = new(side, side * 0.92)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if size <= _MOST_NUMBERS:
        for i, j in zip(*np.nonzero(table), strict=True):
            color = "white" if shares[i, j] > 0.55 else "black"
            axes.text(j, i, f"{int(table[i, j]):,}", ha="center", va="center", fontsize=8, color=color)
    shown = [shortened(name, _NAME) for name in names]
    turned = {} if size < 4 and max(map(len, shown), default=0) < 12 else {"rotation": 90}
    axes.set_xticks(range(size), shown, fontsize=8, **turned)
    axes.set_yticks(range(size), shown, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    for side_name in ("left", "bottom"):
        axes.spines[side_name].set_visible(False)
    return figure
