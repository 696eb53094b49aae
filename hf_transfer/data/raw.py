"""Splits as they were read, before anyone has decided what their columns are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features

from hf_transfer.data.rows import places_of


@dataclass(frozen=True)
class BadExample:
    """An unusable example.

    Attributes:
        split: split of the input data that it belongs to.
        example: its row or file name.
        reason: what is wrong with it.
    """

    split: str
    example: str
    reason: str


class RawSplits(DatasetDict):
    """A `DatasetDict` with what was noticed while reading.

    Attributes:
        notes: messages for the user.
        written: columns that were read as text because their file knows no types (CSV). What a label of such a column
            is, a number or a name, is decided from all of its cells (`data.labels`).
        bad: rows that were left out under `on_bad_example: skip`.
        files: the tables of each split, each with its number of rows; empty if it was not read from tables.
    """

    notes: list[str]
    written: frozenset[str]
    bad: list[BadExample]
    files: dict[str, list[tuple[Path, int]]]

    def __init__(
        self,
        splits: Mapping[str, Dataset],
        notes: Sequence[str] = (),
        written: Iterable[str] = (),
        bad: Sequence[BadExample] = (),
        files: Mapping[str, list[tuple[Path, int]]] | None = None,
    ):
        super().__init__(splits)
        self.notes, self.written, self.bad, self.files = list(notes), frozenset(written), list(bad), dict(files or {})

    @classmethod
    def of(cls, splits: Mapping[str, Dataset]) -> RawSplits:
        """`splits` themselves if they carry notes, else the same without any."""
        return splits if isinstance(splits, cls) else cls(splits)

    def but(self, splits: Mapping[str, Dataset]) -> RawSplits:
        """Other splits with the same notes."""
        return RawSplits(splits, self.notes, self.written, self.bad, self.files)

    @property
    def main(self) -> Dataset:
        """The split that decides what the columns are for: training, or the only one to evaluate on."""
        return self["train"] if "train" in self else next(iter(self.values()))

    def place(self, split: str, row: int) -> str:
        """Where an example stands in the data; see `places`."""
        return places(self.files.get(split, ()), split, [row])[0]


def places(files: Sequence[tuple[Path, int]], split: str, rows: Sequence[int]) -> list[str]:
    """Where examples stand in the data: their file and line, or their row in the split.

    Args:
        files: the tables of the split, each with its number of rows; empty if it was not read from tables.
        split: its name.
        rows: of the examples, in the split.
    """
    found, first = {row: f"row {row} of the {split} split" for row in rows}, 0
    for path, count in files:
        own = {row - first for row in rows if first <= row < first + count}
        found |= {first + row: place for row, place in places_of(path, own).items()} if own else {}
        first += count
    return [found[row] for row in rows]


def with_column(split: Dataset, name: str, values: list[Any], feature: Any, instead_of: Sequence[str]) -> Dataset:
    """`split` with a new column, without others; it may have no other columns."""
    rest = [column for column in split.column_names if column not in instead_of]
    if not rest:  # a dataset without columns forgets how many rows it has
        return Dataset.from_dict({name: values}, features=None if feature is None else Features({name: feature}))
    return split.select_columns(rest).add_column(name, values, feature=feature)


def replaced(split: Dataset, column: str, values: list[Any], feature: Any) -> Dataset:
    """`split` with other values in a column, which stays where it is."""
    return with_column(split, column, values, feature, [column]).select_columns(split.column_names)


def changed(split: Dataset, column: str, read: Callable[[Any], Any], feature: Any) -> Dataset:
    """`split` with `read` of each value in a column, if it has the column."""
    if column not in split.features:
        return split
    return replaced(split, column, [read(v) for v in split[column][:]], feature)


class Streams(dict[str, Any]):
    """`datasets.IterableDataset`s by split, with what was noticed when they were opened; see `RawSplits`."""

    def __init__(self, streams: Mapping[str, Any], notes: Sequence[str] = (), written: Iterable[str] = ()):
        super().__init__(streams)
        self.notes, self.written = list(notes), frozenset(written)
