"""Splits as they were read, before anyone has decided what their columns are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from datasets import Dataset, DatasetDict


class RawSplits(DatasetDict):
    """A `DatasetDict` with what was noticed while reading.

    Attributes:
        notes: messages for the user.
        written: columns that were read as text because their file knows no types (CSV).
    """

    notes: list[str]
    written: frozenset[str]

    def __init__(self, splits: Mapping[str, Dataset], notes: Sequence[str] = (), written: Iterable[str] = ()):
        super().__init__(splits)
        self.notes, self.written = list(notes), frozenset(written)
