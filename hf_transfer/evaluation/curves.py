"""The course of a training run as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_transfer.errors import UserError

LOSSES, METRICS = "losses", "metrics"  # panels
_SHOWN = ("accuracy", "f1_macro", "f1_micro", "exact_match", "mae", "rmse", "pearson")  # metrics, as many as there are
_PREFIX = "eval_"


def draw_curves(history: Any, panels: Sequence[str] = (LOSSES, METRICS), stages: Sequence[tuple[int, str]] = ()) -> Any:
    """A matplotlib figure: losses and validation metrics by step.

    Args:
        history: a pandas frame with a row per log, see `Predictor.history`.
        panels: which of the two, next to each other; metrics that were not logged are left out.
        stages: (first step, name) of the stages; the beginnings of all but the first are marked.

    Raises:
        UserError: nothing was logged.
    """
    from matplotlib.figure import Figure

    losses = {name: label for name, label in (("loss", "training"), ("eval_loss", "validation")) if name in history}
    metrics = {_PREFIX + name: name for name in _SHOWN if _PREFIX + name in history}
    if not losses:
        raise UserError("plot_curves: the run logged no loss.", "Set logging_steps or eval_strategy.")
    series = {LOSSES: ("loss", losses), METRICS: ("validation", metrics)}
    drawn = [panel for panel in panels if series[panel][1]]
    figure = Figure(figsize=(4.6 * max(1, len(drawn)), 3.0), layout="constrained")
    for axes, panel in zip(figure.subplots(1, max(1, len(drawn)), squeeze=False)[0], drawn, strict=False):
        title, lines = series[panel]
        for name, label in lines.items():
            _line(axes, history, name, label)
        for start, _ in stages[1:]:
            axes.axvline(start, color="0.5", linestyle=":", linewidth=1)
        axes.set(xlabel="step", ylabel=title)
        axes.legend()
    return figure


def _line(axes: Any, history: Any, name: str, label: str) -> None:
    rows = history[history[name].notna()]
    axes.plot(rows["step"], rows[name], marker=".", label=label)
