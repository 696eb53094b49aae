"""matplotlib figures as SVG that takes its colors from the page, and as PNG.

On the page, ink and lines are CSS variables, so that one drawing reads on a light and on a dark ground. matplotlib is
imported when the first figure is drawn: it takes half a second, and every run imports this module.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 4.6, 3.0  # inches: as wide as a phone, so that letters are as large as the page's
# What stands for a variable of the page while matplotlib draws.
_VARIABLES = {
    "#010203": "var(--ink)",
    "#040506": "var(--faint)",
    "#070809": "var(--c0)",
    "#0a0b0c": "var(--c1)",
    "#0d0e0f": "var(--c2)",
    "#101112": "var(--c3)",
    "#131415": "var(--c4)",
}
INK, FAINT, *_CYCLE = _VARIABLES
_PLAIN = {
    "text.parse_math": False,  # a label may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
    "image.interpolation": "none",
}
_ON_PAGE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # else ids differ from time to time
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": FAINT,
}


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """Context in which figures are made: for anyone's eyes, without a window."""
    import matplotlib

    with matplotlib.rc_context(_PLAIN | more), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a label: the reader's font has it
        yield


def new(width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, Any]:
    """(figure, its axes) of a size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg(name: str, draw: Callable[[], Any]) -> Markup:
    """A figure for the page.

    Args:
        name: begins the ids of its parts, which must differ from those of other figures of the page.
        draw: makes it.
    """
    from cycler import cycler  # of matplotlib

    file = io.StringIO()
    with style(**_ON_PAGE, **{"axes.prop_cycle": cycler(color=_CYCLE)}):
        draw().savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)
    text = re.sub(
        r'<svg([^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'<svg\1 style="max-width: \2pt"', text, count=1
    )
    return Markup(text)  # matplotlib escapes the texts of a figure


def png(draw: Callable[[], Any]) -> bytes:
    """A figure as PNG, on white.

    Args:
        draw: makes it.
    """
    file = io.BytesIO()
    with style():
        draw().savefig(file, format="png", dpi=120, facecolor="white")
    return file.getvalue()
