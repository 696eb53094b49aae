"""What an answer rests on, and how it is shown: a page of marked words, or a picture with a heatmap."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup, escape

from hf_transfer.errors import shortened
from hf_transfer.files import write_bytes, write_text
from hf_transfer.inference.marked_words import Word

_SMALLEST = 224  # pixels per side of a picture: smaller ones are enlarged
_STRENGTH = 0.65  # of the strongest part of a heatmap, over the picture
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Explanation(ABC):
    """What an answer rests on.

    Attributes:
        input: as in the answer.
        label: class that is explained; of a regression the name of the target.
        probability: of this class; None of a regression.
        value: of a regression; None of classes.
        method: how it was computed, for display.
        suffix: of its file.
    """

    suffix: ClassVar[str] = ""
    input: Any
    label: str
    probability: float | None
    value: float | None
    method: str

    @property
    def title(self) -> str:
        """The class with its probability, or the value."""
        if self.probability is None:
            return f"{self.label}: {self.value:.4g}"
        return f"{self.label}: {self.probability:.1%}"

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write it, as a file of the kind `suffix`."""


@dataclass(frozen=True)
class TextExplanation(Explanation):
    """The words of a text that an answer rests on.

    Attributes:
        words: of the text, or of both texts of a pair; see `Word`. Joined, they are the text as far as it was read.
    """

    words: tuple[tuple[Word, ...], ...] = ()

    suffix: ClassVar[str] = ".html"

    def html(self) -> str:
        """A page that loads nothing from anywhere; every text in it is escaped."""
        return _filled("explanation.html.j2", self)

    def _repr_html_(self) -> str:
        style = (TEMPLATES / "words.css").read_text(encoding="utf-8")
        return f"<div><style>{style}</style>{_filled('explanation_body.html.j2', self)}</div>"

    def save(self, path: str | Path) -> None:
        """Write the page, in HTML."""
        write_text(Path(path), self.html())


@dataclass(frozen=True)
class ImageExplanation(Explanation):
    """The parts of an image that an answer rests on.

    Attributes:
        view: (height, width, 3) 8-bit pixels of what the model saw: resized and cropped.
        heatmap: (height, width) from 0 to 1, the strongest part; what speaks against the class is 0.
    """

    view: Any = field(default=None, repr=False)
    heatmap: Any = field(default=None, repr=False)

    suffix: ClassVar[str] = ".png"

    def png(self) -> bytes:
        """What the model saw, and the same with the heatmap."""
        return _picture(self)

    def _repr_png_(self) -> bytes:
        return self.png()

    def save(self, path: str | Path) -> None:
        """Write the picture, as PNG."""
        write_bytes(Path(path), self.png())


def _filled(template: str, explanation: TextExplanation) -> str:
    every = [word for text in explanation.words for word in text]
    read = [word for word in every if word.value is not None]
    is_value = explanation.value is not None
    found: str = (
        _environment()
        .get_template(template)
        .render(
            title=explanation.title,
            texts=[marked(text, strongest(every)) for text in explanation.words],
            aim="a higher value" if is_value else f"“{explanation.label}”",
            unit="units of the value" if is_value else "log odds",
            method=explanation.method,
            is_cut=len(read) < len(every),
            strongest=sorted(read, key=lambda word: -abs(word.value or 0)),
        )
    )
    return found


@cache
def _environment() -> Any:
    """The templates, which escape everything that is put into them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def strongest(words: Iterable[Word]) -> float:
    """The largest of what words add to an answer or take from it."""
    return max((abs(word.value) for word in words if word.value is not None), default=0.0)


def marked(words: Iterable[Word], most: float) -> Markup:
    """A text with a background behind each word, escaped.

    Args:
        words: of the text.
        most: what the darkest background stands for.
    """
    parts = []
    for word in words:
        text = word.text.lstrip()
        blank = escape(word.text[: len(word.text) - len(text)])
        if word.value is None:
            parts.append(Markup('<span class="unread">{}</span>').format(word.text))
            continue
        share = round(100 * abs(word.value) / most) if most else 0
        side = "for" if word.value > 0 else "against"
        mark = Markup('<mark class="{}" style="--share: {}%" title="{:+.3f}">{}</mark>')
        parts.append(blank + (mark.format(side, share, word.value, text) if share else escape(text)))
    return Markup('<span class="words">{}</span>').format(Markup("").join(parts))


# ---- images ----------------------------------------------------------------------------------------------------------


def overlay(view: Any, heatmap: Any) -> Any:
    """A PIL image of what the model saw, with the heatmap over it.

    Args:
        view: (height, width, 3) 8-bit pixels.
        heatmap: (height, width) from 0 to 1.
    """
    from matplotlib import colormaps
    from PIL import Image

    colors = colormaps["inferno"](np.asarray(heatmap))[..., :3] * 255
    gray = np.asarray(view, dtype=np.float64).mean(-1, keepdims=True) * 0.6 + np.asarray(view) * 0.4
    weight = _STRENGTH * np.sqrt(np.asarray(heatmap, dtype=np.float64))[..., None]
    return Image.fromarray((gray * (1 - weight) + colors * weight).round().astype(np.uint8))


def _picture(explanation: ImageExplanation) -> bytes:
    """A PNG: what the model saw, and the same with the heatmap."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from PIL import Image

    seen = Image.fromarray(explanation.view)
    shown = (seen, overlay(explanation.view, explanation.heatmap))
    height, width = explanation.heatmap.shape
    times = max(1.0, _SMALLEST / min(height, width))
    size = (width * times / 100, height * times / 100)  # inches
    with rc_context({"text.parse_math": False, "font.size": 8}):
        figure = Figure(figsize=(2 * size[0] + 0.3, size[1] + 0.45), layout="constrained")
        titles = ("what the model saw", shortened(explanation.title, 40))
        for axes, image, title in zip(figure.subplots(1, 2), shown, titles, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(title)
            axes.set_axis_off()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
