"""Figures of a run for notebooks, in matplotlib's own colors."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from hf_transfer.errors import UserError, shortened
from hf_transfer.report import plots
from hf_transfer.report.answers import cut
from hf_transfer.report.blocks import Card
from hf_transfer.report.course import rate_map_of
from hf_transfer.report.examples import cards
from hf_transfer.report.figures import style
from hf_transfer.report.run_files import RunFiles
from hf_transfer.run_folder import ERRORS

_COLUMNS = 4
_WIDTH, _LINES = 60, 5  # of a text: characters in a line, and lines


def confusion_figure(counts: Any, names: Sequence[str]) -> Any:
    """The confusion matrix of single-label classification; of many classes, those of the most frequent errors.

    Args:
        counts: see `metrics.confusion`.
        names: of the classes.
    """
    shown, table, _ = cut(counts, len(names))
    with style():
        return plots.confusion([names[one] for one in shown], table)


def plan_figure(run: RunFiles) -> Any:
    """The learning rates that each layer group had.

    Raises:
        UserError: nothing was logged by layer group.
    """
    found = rate_map_of(run)
    if found is None:
        raise UserError("plot_plan: the run logged no learning rates by layer group.", "Train with a strategy.")
    with style():
        return plots.rate_map(found)


def mistakes_figure(run: RunFiles, most: int) -> Any:
    """Wrong answers, those with the highest loss first.

    Args:
        run: files of the run.
        most: examples.

    Raises:
        UserError: there are none.
    """
    from matplotlib.figure import Figure

    shown = cards(run)[:most]
    if not shown:
        raise UserError(f"plot_mistakes: the run has no wrong answers in {ERRORS}.")
    columns = _COLUMNS if any(card.picture for card in shown) else 2
    rows = -(-len(shown) // columns)
    with style():
        figure = Figure(figsize=(11, rows * (2.9 if columns == _COLUMNS else 1.7)), layout="constrained")
        for axes, card in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
            _draw(axes, card)
        for axes in figure.axes:
            axes.set_axis_off()
    return figure


def _draw(axes: Any, card: Card) -> None:
    """An example with its label and the answer."""
    lines = dict(card.lines)
    answer = f"{shortened(lines['predicted'], 24)} {lines.get('probability', '')}".rstrip()
    axes.set_title(f"{answer}\nnot {shortened(lines['true'], 24)}", fontsize=9, loc="left")
    if card.picture:
        from PIL import Image

        content = base64.b64decode(card.picture.partition(",")[2])
        axes.imshow(Image.open(io.BytesIO(content)))
        return
    text = card.text or card.place
    wrapped = textwrap.wrap(text, _WIDTH, max_lines=_LINES, placeholder=" …")
    axes.text(0, 1, "\n".join(wrapped), fontsize=8, va="top", transform=axes.transAxes)
