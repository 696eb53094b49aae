"""Training on a stream: rows become examples as they pass, without those that are held out."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets import Dataset, Features

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import EXAMPLE
from hf_transfer.data.columns import number_in
from hf_transfer.data.duplicates import content_hash
from hf_transfer.data.groups import NO_GROUP, group_of, groups_of
from hf_transfer.data.images import undecoded
from hf_transfer.data.label_columns import find_labels
from hf_transfer.data.labels import LABELS, Labels, bad_labels, encode
from hf_transfer.data.splits import Data
from hf_transfer.data.stream_record import Passed
from hf_transfer.data.table_streams import PLACE, REASON
from hf_transfer.errors import UserError, one_line

_BATCH = 64  # rows preprocessed at a time
_MAX_REPORTED = 20  # skipped examples that each process reports
_MIN_SEEN = 1_000  # examples after which `max_bad_fraction` applies
Change = Callable[[dict[str, Any]], dict[str, Any]]


def explained_rows(rows: Iterator[Any]) -> Iterator[Any]:
    """Yield `rows`, turning the errors of `datasets` for unreadable files into `UserError`."""
    try:
        yield from rows
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        cause = error.__cause__ or error
        raise UserError(f"Reading the stream failed ({one_line(cause, 200)}).") from error


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """An endless training set: repeated passes over a stream, each in a different order determined by the seed.

    Each worker reads its own shards (files). Only the shuffle buffer is kept in memory.

    Args:
        source: `datasets.IterableDataset` of raw rows.
        read: turns rows into training examples.
        seed: seed of the order.
        buffer: size of the shuffle buffer in examples; at most 1 keeps the order of the stream.
    """

    def __init__(self, source: Any, read: Reader, seed: int, buffer: int):
        self.source, self.read, self.seed, self.buffer = source, read, seed, buffer

    @property
    def shards(self) -> int:
        """Number of shards, and thus the number of workers that can read in parallel."""
        return int(self.source.num_shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            source = self.source
            if self.buffer > 1:
                source = source.shuffle(seed=self.seed * 1_000_003 + turn, buffer_size=self.buffer)
            rows, is_empty = explained_rows(iter(source)), True
            while batch := list(itertools.islice(rows, _BATCH)):
                for example in self.read(batch, turn):
                    is_empty = False
                    yield example
            if is_empty:  # a worker without a shard, or without a usable example
                return


@dataclass
class Reader:
    """Turns rows of a stream into training examples.

    Attributes:
        inputs: names of the input columns.
        features: features of the stream.
        labels: problem type and classes.
        args: data keys, with the label column set.
        held: marks of the held-out examples, see `mark`.
        read: the task's `read`, which raises `ValueError` for an unusable input.
        change: turns a batch of inputs into model inputs, see `Task.change`.
        held_groups: groups of the validation examples that were held out of the stream; None if groups do not matter.
        numbers: inputs that were written as text and that the beginning showed to be numbers.
        passed: where the content of each example is recorded; None to record nothing.
        seen: number of training examples read so far.
        bad: number of examples skipped so far.
    """

    inputs: tuple[str, ...]
    features: Features
    labels: Labels
    args: DataArguments
    held: frozenset[bytes]
    read: Callable[[Any], Any]
    change: Change
    held_groups: frozenset[str] | None = None
    numbers: frozenset[str] = frozenset()
    passed: Passed | None = None
    seen: int = 0
    bad: int = 0

    def __call__(self, rows: Sequence[dict[str, Any]], turn: int) -> Iterator[dict[str, Any]]:
        """Training examples from `rows`, except held-out ones.

        Args:
            rows: rows of the stream.
            turn: number of the pass over the stream.

        Raises:
            UserError: an example is unusable and `on_bad_example` is not `skip`, or too many were skipped.
        """
        usable: dict[str, list[Any]] = {name: [] for name in (*self.inputs, LABELS, EXAMPLE)}
        contents: list[list[Any]] = []
        for row, (label, wrong_label) in zip(rows, self._labels(rows), strict=True):
            raw, wrong_input = self._inputs(row)
            row_mark, group = mark(raw), self._group(row)
            if row_mark in self.held or (self.held_groups and group in self.held_groups):
                continue
            reason = row.get(REASON) or wrong_input or wrong_label
            reason = reason or (NO_GROUP if self.held_groups is not None and group is None else "")
            values, reason = ([], reason) if reason else self._values(raw)
            self.seen += 1
            if reason:
                self._skip(raw, reason, row.get(PLACE, ""))
                continue
            for column, value in zip(self.inputs, values, strict=True):
                usable[column].append(value)
            usable[LABELS].append(label)
            contents.append(raw)
            # Random changes depend on the example and the pass.
            number = int.from_bytes(content_hash(row_mark, str(turn).encode()), "little") >> 1
            usable[EXAMPLE].append(number)
        if not contents:
            return
        columns = self.change(usable)
        is_first = turn == 0  # a later pass gives the same examples
        with self.passed.recording() if self.passed and is_first else contextlib.nullcontext() as record:
            for i, example in enumerate(contents):
                if record:
                    record(example)
                yield {name: column[i] for name, column in columns.items()}

    def _inputs(self, row: dict[str, Any]) -> tuple[list[Any], str]:
        """(the input cells, the reason why one cannot be used or an empty string)."""
        cells, reason = [row[c] for c in self.inputs], ""
        for i, column in enumerate(self.inputs):
            if column in self.numbers:
                try:
                    cells[i] = number_in(cells[i])
                except ValueError as error:
                    reason = f"column {column!r} contains {error}"
        return cells, reason

    def _group(self, row: dict[str, Any]) -> str | None:
        """The group of an example; None if it has none, or groups do not matter."""
        column = self.args.split_group_column_name
        return None if self.held_groups is None or column is None else group_of(row[column], self.features[column])

    def _values(self, raw: Sequence[Any]) -> tuple[list[Any], str]:
        """(the inputs as the task reads them, the reason why they are unusable or an empty string)."""
        if all(v is None or (isinstance(v, str) and not v.strip()) for v in raw):
            return [], "empty text" if isinstance(raw[0], str) else "no value"
        try:
            return [self.read(value) for value in raw], ""
        except ValueError as error:
            return [], str(error)

    def _labels(self, rows: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
        """(encoded label, the reason why it is unusable or an empty string) of each row."""
        given = self.args.label_column_name
        columns = [given] if isinstance(given, str) else list(given or [])
        table = Dataset.from_list(
            [{c: row[c] for c in columns} for row in rows], features=Features({c: self.features[c] for c in columns})
        )
        found = find_labels({"train": table}, (), self.args, self.labels)
        split, column = found.splits["train"], found.name
        reasons = bad_labels(split, "train", column, self.labels)
        usable = [i for i in range(len(rows)) if i not in reasons]
        if not usable:
            return [(None, reasons[i]) for i in range(len(rows))]
        numbers = iter(encode(split.select(usable), "train", column, self.labels)[LABELS][:])
        return [(None, reasons[i]) if i in reasons else (next(numbers), "") for i in range(len(rows))]

    def _skip(self, raw: Sequence[Any], reason: str, place: str) -> None:
        cell = raw[0]
        text = cell.get("path") if isinstance(cell, dict) else cell
        name = ", ".join(filter(None, (place, repr(str(text)[:40]) if text else ""))) or "unnamed"
        if self.args.on_bad_example != "skip":
            raise UserError(
                f"Unusable example in the stream ({name}): {reason}.",
                "Fix it, or set on_bad_example: skip to leave such examples out.",
            )
        self.bad += 1
        if self.bad <= _MAX_REPORTED:
            sys.stderr.write(f"hf-transfer: skipped an unusable example in the stream ({name}): {reason}.\n")
        if self.seen >= _MIN_SEEN and self.bad > self.args.max_bad_fraction * self.seen:
            raise UserError(
                f"max_bad_fraction: {self.bad:,} of {self.seen:,} examples of the stream are unusable.",
                "Check the data, or raise max_bad_fraction.",
            )


def mark(values: Sequence[Any]) -> bytes:
    """Hash that identifies an example anywhere in a stream: of its content, or of its path if it is a file."""
    parts = []
    for value in values:
        cell = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        parts.append(cell if isinstance(cell, bytes) else str(cell).encode("utf-8", "surrogatepass"))
    return content_hash(*parts)


def held_out(data: Data) -> frozenset[bytes]:
    """The marks of all validation and test examples."""
    marks: set[bytes] = set()
    for split in (data.validation, data.test):
        if split is not None:
            with contextlib.closing(undecoded(split, data.inputs).iter(batch_size=1000)) as batches:
                for batch in batches:
                    marks |= {mark(row) for row in zip(*(batch[c] for c in data.inputs), strict=True)}
    return frozenset(marks)


def held_groups(data: Data, args: DataArguments) -> frozenset[str] | None:
    """The groups of a validation split that was drawn from the training split; None without such groups."""
    if not (args.split_group_column_name and data.drawn_from):
        return None
    return frozenset(g for g in groups_of(data.validation, args.split_group_column_name) if g is not None)
