"""What the columns of a table look like (texts, categories, identifiers, numbers), to infer what they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from datasets import ClassLabel, Dataset, Value

from hf_transfer.data.raw import BadExample, RawSplits, replaced
from hf_transfer.errors import UserError, listed, option, shortened

_SAMPLE = 1000  # rows that are looked at
_FEW = 20  # a column with at most this many values may be classes, however few rows there are
_WORDS, _CHARACTERS = 3.0, 30.0  # mean length from which on a column of strings is text
_ONE_WORD = 1.5  # mean number of words below which cells are single words
_SHORT = 6.0  # mean number of words below which names are told from texts
_MOST_SHOWN = 5  # columns of which a line to copy is shown
_NUMBER = re.compile(r"[-+]?(\d+[.,]?\d*|\.\d+)([eE][-+]?\d+)?|true|false", re.IGNORECASE)
_SIGN = re.compile(r"[\d!-/:-@\[-`{-~]")
# Names under which texts are found, whatever their cells look like.
TEXT_NAMES = ("text", "sentence", "sentence1", "sentence2", "premise", "hypothesis", "question", "question1",
              "question2", "text_pair", "title")  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What the beginning of a column holds.

    Attributes:
        rows: cells that are not missing.
        distinct: how many of them are different.
        words: mean number of words.
        characters: mean number of characters.
        numeric: whether all of them are numbers or truth values.
        letters: share of the characters that are neither digits nor ASCII punctuation, without spaces.
        capitals: share of the words that begin with a capital letter or a digit.
        ascii: whether all of them are plain ASCII.
        example: one of them.
    """

    rows: int
    distinct: int
    words: float
    characters: float
    numeric: bool
    letters: float = 1.0
    capitals: float = 0.0
    ascii: bool = False
    example: str = ""

    @property
    def is_text(self) -> bool:
        """Whether the cells read like texts: long, and mostly different; no addresses of pages, hashes or dates."""
        is_long = self.words >= _WORDS or self.characters >= _CHARACTERS
        is_code = self.ascii and self.words < _ONE_WORD  # in scripts without spaces, one word may be a sentence
        is_prose = not self.numeric and not is_code and self.letters >= 0.5
        return is_prose and is_long and self.distinct > self.rows / 5

    @property
    def is_name(self) -> bool:
        """Whether the cells are short and capitalized throughout, as names of people, places and films are."""
        return self.words < _SHORT and self.capitals >= 0.9

    @property
    def is_category(self) -> bool:
        """Whether few values repeat."""
        return self.rows > self.distinct and self.distinct <= max(_FEW, self.rows // 10)

    @property
    def is_identifier(self) -> bool:
        """Whether (nearly) every cell has a value of its own, in one word."""
        return self.words < _ONE_WORD and self.distinct > 0.9 * self.rows


class Columns(dict[str, Any]):
    """The features of a split, with the looks of its columns.

    A column that was written as text and holds numbers alone is shown as numbers, unless its name is that of a text.

    Attributes:
        looks: by name of the column, for strings and numbers.
    """

    looks: dict[str, Look]

    def __init__(self, split: Dataset, written: frozenset[str] = frozenset(), texts: str | Sequence[str] | None = None):
        super().__init__(split.features)
        beginning = split.select(range(min(len(split), _SAMPLE)))
        plain = [n for n, f in split.features.items() if isinstance(f, Value)]
        self.looks = {name: look(beginning[name][:]) for name in plain}
        named = [texts] if isinstance(texts, str) else list(texts or ())
        for name in written & set(plain):
            if self.looks[name].numeric and name not in (*TEXT_NAMES, *named):
                self[name] = Value("float64")


def shown_numbers(splits: RawSplits, columns: Columns, inputs: Sequence[str]) -> frozenset[str]:
    """The input columns that were written as text and are shown as numbers."""
    return frozenset(n for n in inputs if n in splits.written and columns[n] == Value("float64"))


def as_shown(splits: RawSplits, columns: Columns, inputs: Sequence[str], skip_bad: bool) -> RawSplits:
    """The splits with numbers in the input columns that were written as text and are shown as numbers.

    Args:
        splits: raw splits.
        columns: what their columns look like.
        inputs: the input columns.
        skip_bad: leave out rows in which one is no number (they are in `bad`) instead of stopping.

    Raises:
        UserError: a cell is no number.
    """
    for column in sorted(shown_numbers(splits, columns, inputs)):
        typed = {}
        for name, split in splits.items():
            typed[name] = split
            if column in split.features:
                values, wrong = _numbers(split, column)
                if wrong and not skip_bad:
                    row, reason = next(iter(wrong.items()))
                    raise UserError(
                        f"{splits.place(name, row)}: column {column!r} contains {reason}.",
                        "Correct it, or set on_bad_example: skip to leave such rows out.",
                    )
                splits.bad += [BadExample(name, splits.place(name, row), why) for row, why in wrong.items()]
                split = replaced(split, column, values, Value("float64"))
                typed[name] = split.select([i for i in range(len(split)) if i not in wrong]) if wrong else split
        splits = splits.but(typed)
    return splits


def _numbers(split: Dataset, column: str) -> tuple[list[float | None], dict[int, str]]:
    """(the numbers of a column that was written as text, what is wrong with a row that has none)."""
    values, wrong = list[float | None](), dict[int, str]()
    for row, cell in enumerate(split[column][:]):
        try:
            values.append(number_in(cell))
        except ValueError as error:
            values.append(None)
            wrong[row] = str(error)
    return values, wrong


def number_in(cell: str | None) -> float | None:
    """The number that a cell holds, a truth value as 0 or 1; None if it is empty.

    Raises:
        ValueError: it holds none.
    """
    if cell is None or not cell.strip():
        return None
    text = cell.strip().lower()
    if not _NUMBER.fullmatch(text) or "," in text:
        raise ValueError(f"{cell[:40]!r}, which is not a number with a decimal point")
    return float({"false": 0, "true": 1}.get(text, text))


def look(cells: Sequence[Any]) -> Look:
    """What the cells of a column look like."""
    given = [str(c) for c in cells if c is not None and str(c).strip()]
    if not given:
        return Look(0, 0, 0.0, 0.0, False)
    words = [word for cell in given for word in cell.split()]
    signs = sum(len(_SIGN.findall(word)) for word in words)
    length = sum(map(len, given))
    return Look(
        rows=len(given),
        distinct=len(set(given)),
        words=len(words) / len(given),
        characters=length / len(given),
        numeric=all(_NUMBER.fullmatch(c.strip()) for c in given),
        letters=1 - signs / sum(map(len, words)),
        capitals=sum(word[0].isupper() or word[0].isdigit() for word in words) / len(words),
        ascii=all(map(str.isascii, given)),
        example=given[0],
    )


def text_candidates(features: Mapping[str, Any], not_texts: Sequence[Any]) -> list[str]:
    """The columns that may hold the text.

    Columns of strings; where there are several, those that read like texts, without names next to longer ones, else
    those that are neither categories nor identifiers.

    Args:
        features: `Columns`, or features without looks.
        not_texts: columns that are known to hold something else.
    """
    strings = [n for n, f in features.items() if isinstance(f, Value) and f.dtype in ("string", "large_string")]
    strings = [n for n in strings if n not in not_texts]
    if len(strings) < 2 or not isinstance(features, Columns):
        return strings
    looks = {n: features.looks[n] for n in strings}
    texts = [n for n in strings if looks[n].is_text]
    return (
        [n for n in texts if not looks[n].is_name]
        or texts
        or [n for n in strings if not looks[n].is_category and not looks[n].is_identifier]
        or strings
    )


def several_texts(features: Mapping[str, Any], columns: Sequence[str]) -> UserError:
    """The error for several columns that may be the text, with a line to copy for each, and one for a pair."""
    key = "text_column_name"
    lines = [option(key, name) for name in columns[:_MOST_SHOWN]] + [option(key, list(columns[:2]))]
    width = max(map(len, lines))
    looks = [features.looks[n] for n in columns[:_MOST_SHOWN]] if isinstance(features, Columns) else []
    said = [f"{look.words:.0f} words each, such as {shortened(look.example, 40)!r}" for look in looks]
    shown = [f"\n  {a:<{width}}   {b}".rstrip() for a, b in zip_longest(lines[:-1], said, fillvalue="")]
    return UserError(
        f"several columns may be the text: {listed(columns, _MOST_SHOWN)}.",
        f"Name one, or two that are read as a pair:{''.join(shown)}\n  {lines[-1]:<{width}}   both of them",
        key=key,
    )


def label_candidates(split: Dataset, columns: Sequence[str]) -> list[str]:
    """Those of `columns` in which few values repeat; all of them if there is none."""
    looks = Columns(split).looks
    is_class = {n: isinstance(split.features[n], ClassLabel) for n in columns}
    return [n for n in columns if is_class[n] or (n in looks and looks[n].is_category)] or list(columns)


def unread(features: Columns, inputs: Sequence[str], others_used: Sequence[str] = ()) -> list[str]:
    """Notes on columns that are not used; those that read like texts are named as such, with the key to read one."""
    used = (*inputs, *others_used)
    rest = [n for n in features if n not in used]
    texts = [n for n in rest if n in features.looks and features.looks[n].is_text]
    others = [n for n in rest if n not in texts]
    notes = []
    if texts:
        is_text = len(inputs) == 1 and inputs[0] in features.looks  # and no image
        key = option("text_column_name", [inputs[0], texts[0]] if is_text else None)
        reads = f"{key} reads both" if is_text else key
        notes.append(f"Not read, although it looks like text: column {_named(texts)} ({reads}).")
    if others:
        notes.append(f"Not used: column {_named(others)}.")
    return notes


def _named(columns: Sequence[str]) -> str:
    return listed(map(repr, columns), 10)
