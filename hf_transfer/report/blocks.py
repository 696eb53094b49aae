"""What a section of a report consists of. The template draws each kind and escapes every text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: plain.
        tone: `warning`, `muted`, or empty.
    """

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Tile:
    """A number that stands out."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Numbers next to each other."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Cell:
    """A cell of a table with a background.

    Attributes:
        text: of the cell.
        share: strength of the background, 0 to 1.
        color: of it: `good`, `bad`, or empty.
    """

    text: str
    share: float
    color: str = ""

    @property
    def percent(self) -> int:
        return round(100 * min(max(self.share, 0.0), 1.0))


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns.
        rows: cells: text, numbers, or `Cell`.
        words: number of columns at the left that are words; the others are numbers.
        folded: title of a fold that hides the table until it is clicked; empty for none.
        is_matrix: whether the columns are classes: narrow, their names turned.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: int = 1
    folded: str = ""
    is_matrix: bool = False

    @property
    def style(self) -> str:
        """Classes of the table on the page: names of classes that are not as short as a number are turned."""
        is_long = any(len(name) > 3 for name in self.head[self.words :])
        return f"matrix{' turned' if is_long else ''}" if self.is_matrix else ""


@dataclass(frozen=True)
class Figures:
    """Drawings, which stand below each other on a phone."""

    kind: ClassVar[str] = "figures"
    drawings: Sequence[Markup]


@dataclass(frozen=True)
class Near:
    """An example next to a card's own."""

    place: str
    note: str
    picture: str | None = None
    text: str = ""


@dataclass(frozen=True)
class Card:
    """An example.

    Attributes:
        place: where it stands in the data.
        lines: (name, value) pairs.
        picture: a data URL; None without one.
        text: of the example.
        near: training examples like it.
        words: its texts with marked words, escaped, instead of `text`.
    """

    place: str
    lines: Sequence[tuple[str, str]]
    picture: str | None = None
    text: str = ""
    near: Sequence[Near] = ()
    words: Sequence[Markup] = ()


@dataclass(frozen=True)
class Cards:
    """Examples."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Picture:
    """A picture as wide as the page.

    Attributes:
        source: a data URL.
        about: text for who does not see it.
    """

    kind: ClassVar[str] = "picture"
    source: str
    about: str


@dataclass(frozen=True)
class Code:
    """Commands or Python."""

    kind: ClassVar[str] = "code"
    text: str


Block = Text | Tiles | Table | Figures | Cards | Picture | Code
