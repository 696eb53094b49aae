"""The course of a training run as a figure."""

from __future__ import annotations

from typing import Any

from hf_transfer.errors import UserError

_SHOWN = ("accuracy", "f1_macro", "f1_micro", "exact_match", "mae", "rmse", "pearson")  # metrics, as many as there are
_PREFIX = "eval_"


def draw_curves(history: Any) -> Any:
    """A matplotlib figure: losses and validation metrics by step.

    Args:
        history: a pandas frame with a row per log, see `Predictor.history`.

    Raises:
        UserError: matplotlib is not installed, or nothing was logged.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plot_curves: matplotlib is not installed.", "pip install matplotlib") from error
    losses = {name: label for name, label in (("loss", "training"), ("eval_loss", "validation")) if name in history}
    metrics = [name for name in _SHOWN if _PREFIX + name in history]
    if not losses:
        raise UserError("plot_curves: the run logged no loss.", "Set logging_steps or eval_strategy.")
    figure = Figure(figsize=(5 * (1 + bool(metrics)), 3.5), layout="constrained")
    axes = figure.subplots(1, 1 + bool(metrics), squeeze=False)[0]
    for name, label in losses.items():
        _line(axes[0], history, name, label)
    axes[0].set(xlabel="step", ylabel="loss")
    for name in metrics:
        _line(axes[1], history, _PREFIX + name, name)
    if metrics:
        axes[1].set(xlabel="step", ylabel="validation")
    for one in axes:
        one.legend()
    return figure


def _line(axes: Any, history: Any, name: str, label: str) -> None:
    rows = history[history[name].notna()]
    axes.plot(rows["step"], rows[name], marker=".", label=label)
