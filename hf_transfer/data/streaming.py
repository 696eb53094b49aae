"""Streaming: read the training set while training, for datasets larger than the disk.

The first examples of the stream are read in advance and treated like an ordinary dataset: they determine the columns,
the classes, the data facts and, if there is no validation split, the examples held out for validation. Training then
reads the stream from the start and skips held-out examples wherever they occur.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import EXAMPLE
from hf_transfer.data.duplicates import content_hash
from hf_transfer.data.groups import NO_GROUP, group_of, groups_of
from hf_transfer.data.image_folders import read_image_folder
from hf_transfer.data.images import undecoded
from hf_transfer.data.label_columns import find_labels
from hf_transfer.data.labels import LABELS, Labels, bad_labels, encode
from hf_transfer.data.locate import Kind, Source, Tables, folder_errors, locate
from hf_transfer.data.raw import BadExample, RawSplits, Streams
from hf_transfer.data.split_names import standard_name
from hf_transfer.data.splits import Data
from hf_transfer.data.stream_order import check_order, interleaved
from hf_transfer.data.table_streams import PLACE, REASON, table_stream
from hf_transfer.errors import UserError, one_line

LOOK_TEXTS, LOOK_IMAGES = 10_000, 1_000  # minimum number of examples read in advance
_BATCH = 64  # rows preprocessed at a time
_MAX_REPORTED = 20  # skipped examples that each process reports
_MIN_SEEN = 1_000  # examples after which `max_bad_fraction` applies
Change = Callable[[dict[str, Any]], dict[str, Any]]


# ---- the examples read in advance ----------------------------------------------------------------------------------


def beginning(args: DataArguments, source: Source | None = None) -> RawSplits:
    """The splits that are read in advance: validation and test, and the first examples of the training stream.

    Args:
        args: data keys.
        source: where the data is, if that is known already.

    Raises:
        UserError: the data does not exist, cannot be streamed, or has an empty split.
    """
    source = source or locate(args)
    streams = open_streams(args, source)
    numbers = {"train": _num_training_examples(streams, args), "validation": args.max_eval_samples}
    if args.max_predict_samples:
        numbers["test"] = args.max_predict_samples
    raw = RawSplits({}, streams.notes, _written(source, streams))
    for name, number in numbers.items():
        if name in streams:
            raw[name], bad = _take(name, streams[name], number, args)
            raw.bad += bad
            if not len(raw[name]):
                raise UserError(f"The {name} split has no examples.")
    check_order(raw["train"], len(raw["train"]) + len(raw.bad) < (numbers["train"] or 0), args)
    raw.notes += [f"Not used: the {name} split of the stream." for name in streams if name not in raw]
    return raw


def _written(source: Source, streams: Streams) -> frozenset[str]:
    """The columns of the training stream that were read as text; see `RawSplits`."""
    tables = source.files.get("train", source.tables)
    if tables is None or "train" not in tables.paths or tables.format_of("train") != "csv":
        return streams.written
    return frozenset(streams["train"].features) - {PLACE, REASON}


def _num_training_examples(streams: dict[str, Any], args: DataArguments) -> int:
    """How many training examples to read in advance: enough to hold out a validation split."""
    has_images = any(isinstance(f, Image) for f in (streams["train"].features or {}).values())
    least = LOOK_IMAGES if has_images else LOOK_TEXTS
    assert args.max_eval_samples is not None, "checked with the keys"
    return least if "validation" in streams else max(least, math.ceil(args.max_eval_samples / args.train_val_split))


def _take(name: str, stream: Any, number: int | None, args: DataArguments) -> tuple[Dataset, list[BadExample]]:
    """(the first rows of a stream, the rows left out).

    Raises:
        UserError: a row does not fit, and such rows are not left out.
    """
    rows, bad = [], list[BadExample]()
    for row in _explained(itertools.islice(stream, number)):
        place, reason = row.pop(PLACE, ""), row.pop(REASON, None)
        if reason is None:
            rows.append(row)
        elif args.on_bad_example == "skip":
            bad.append(BadExample(name, place, reason))
        else:
            raise UserError(f"{place}: {reason}.", "Correct the file, or set on_bad_example: skip.")
    features = stream.features
    if features is not None:
        features = Features({c: f for c, f in features.items() if c not in (PLACE, REASON)})
    return Dataset.from_list(rows, features=features), bad


def open_streams(args: DataArguments, source: Source | None = None) -> Streams:
    """The streams of the data by split, with undecoded images.

    Args:
        args: data keys.
        source: where the data is, if that is known already.

    Raises:
        UserError: the data does not exist, cannot be streamed, or has no training split.
    """
    source = source or locate(args)
    named = _open_named(source, args)
    streams = Streams({standard_name(name): stream for name, stream in named.items()}, named.notes, named.written)
    for split, tables in source.files.items():
        streams[split] = _open_tables(tables, args)[split]
    if "train" not in streams:
        raise UserError(f"dataset_name: {args.dataset_name!r} has no train split; its splits are {', '.join(streams)}.")
    return Streams({name: _undecoded(stream) for name, stream in streams.items()}, streams.notes, streams.written)


def _undecoded(stream: Any) -> Any:
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, Image):
            stream = stream.cast_column(column, Image(decode=False))
    return stream


def _open_named(source: Source, args: DataArguments) -> Streams:
    """The streams of `dataset_name` by split."""
    if source.kind is Kind.NOTHING:
        return Streams({})
    if source.kind in (Kind.IN_MEMORY, Kind.BUNDLED, Kind.SAVED):
        raise UserError("streaming: this data is already on disk or in memory.", "Remove streaming.")
    if source.tables is not None:
        return Streams(_open_tables(source.tables, args))
    if source.kind is Kind.IMAGE_FOLDER:
        with folder_errors(source.path):
            raw = read_image_folder(source.path, args)
        streams = {name: interleaved(split) for name, split in raw.items()}
        return Streams(streams, raw.notes, raw.written)
    try:
        return Streams(datasets.load_dataset(source.name, args.dataset_config_name, streaming=True))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"dataset_name: {source.name!r} cannot be streamed ({one_line(error)}).") from error


def _open_tables(tables: Tables, args: DataArguments) -> dict[str, Any]:
    streams = {}
    for split, paths in tables.paths.items():
        try:
            streams[split] = table_stream(paths, args)
        except UserError as error:
            raise (error if error.key else error.with_key(tables.key)) from error
    return streams


def _explained(rows: Iterator[Any]) -> Iterator[Any]:
    """Yield `rows`, turning the errors of `datasets` for unreadable files into `UserError`."""
    try:
        yield from rows
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        cause = error.__cause__ or error
        raise UserError(f"Reading the stream failed ({one_line(cause, 200)}).") from error


# ---- training ------------------------------------------------------------------------------------------------------


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
            rows, is_empty = _explained(iter(source)), True
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
        for row, (label, reason) in zip(rows, self._labels(rows), strict=True):
            raw = [row[c] for c in self.inputs]
            row_mark, group = mark(raw), self._group(row)
            if row_mark in self.held or (self.held_groups and group in self.held_groups):
                continue
            reason = row.get(REASON) or reason
            reason = reason or (NO_GROUP if self.held_groups is not None and group is None else "")
            values, reason = ([], reason) if reason else self._values(raw)
            self.seen += 1
            if reason:
                self._skip(raw, reason, row.get(PLACE, ""))
                continue
            for column, value in zip(self.inputs, values, strict=True):
                usable[column].append(value)
            usable[LABELS].append(label)
            # Random changes depend on the example and the pass.
            number = int.from_bytes(content_hash(row_mark, str(turn).encode()), "little") >> 1
            usable[EXAMPLE].append(number)
        if usable[LABELS]:
            columns = self.change(usable)
            for i in range(len(usable[LABELS])):
                yield {name: column[i] for name, column in columns.items()}

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
