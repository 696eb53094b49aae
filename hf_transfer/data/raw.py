"""Splits as they were read, before anyone has decided what their columns are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict


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
    """

    notes: list[str]
    written: frozenset[str]
    bad: list[BadExample]

    def __init__(
        self,
        splits: Mapping[str, Dataset],
        notes: Sequence[str] = (),
        written: Iterable[str] = (),
        bad: Sequence[BadExample] = (),
    ):
        super().__init__(splits)
        self.notes, self.written, self.bad = list(notes), frozenset(written), list(bad)

    @classmethod
    def of(cls, splits: Mapping[str, Dataset]) -> RawSplits:
        """`splits` themselves if they carry notes, else the same without any."""
        return splits if isinstance(splits, cls) else cls(splits)

    def but(self, splits: Mapping[str, Dataset]) -> RawSplits:
        """Other splits with the same notes."""
        return RawSplits(splits, self.notes, self.written, self.bad)


class Streams(dict[str, Any]):
    """`datasets.IterableDataset`s by split, with what was noticed when they were opened; see `RawSplits`."""

    def __init__(self, streams: Mapping[str, Any], notes: Sequence[str] = (), written: Iterable[str] = ()):
        super().__init__(streams)
        self.notes, self.written = list(notes), frozenset(written)
