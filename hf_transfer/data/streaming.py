"""Data that is read as it comes, and never held: for data sets that are larger than the disk.

The beginning of a stream is read first and treated as a data set of its own: from it come the columns, the classes,
the data facts and, where there is no validation split, the examples that validate. Then training reads the stream
from its beginning, without the examples that are held out, wherever they come.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, DatasetDict, Features, Image

from hf_transfer import hub_client
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import EXAMPLE
from hf_transfer.data.duplicates import content_hash
from hf_transfer.data.image_paths import with_images
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, Labels, bad_labels, encode, find_labels
from hf_transfer.data.load import (
    FORMATS,
    is_pattern,
    matching,
    split_files,
    split_folders,
    standard_name,
    table_options,
)
from hf_transfer.data.splits import Data
from hf_transfer.errors import UserError, one_line

LOOK_TEXTS, LOOK_IMAGES = 10_000, 1_000  # examples of the beginning that are looked at, at least
_BATCH = 64  # rows that are read into what the model takes at a time
_SAID = 20  # skipped examples that each process names
_ENOUGH = 1_000  # examples of which a share can be told
Change = Callable[[dict[str, Any]], dict[str, Any]]


# ---- the beginning -------------------------------------------------------------------------------------------------


def beginning(args: DataArguments) -> DatasetDict:
    """The splits of a stream as far as they are looked at: all that validates and tests, and where training begins.

    Raises:
        UserError: there is no such data, or it cannot be streamed.
    """
    streams = open_streams(args)
    found = {"train": _taken(streams["train"], _length(streams, args))}
    if "validation" in streams:
        found["validation"] = _taken(streams["validation"], args.max_eval_samples)
    if "test" in streams and args.max_predict_samples:
        found["test"] = _taken(streams["test"], args.max_predict_samples)
    for name, split in found.items():
        if not len(split):
            raise UserError(f"The {name} split has no examples.")
    return DatasetDict(found)


def _length(streams: dict[str, Any], args: DataArguments) -> int:
    """How many examples of the training stream to look at: enough to draw those that validate from."""
    has_images = any(isinstance(f, Image) for f in (streams["train"].features or {}).values())
    least = LOOK_IMAGES if has_images else LOOK_TEXTS
    assert args.max_eval_samples is not None, "checked with the keys"
    return least if "validation" in streams else max(least, math.ceil(args.max_eval_samples / args.train_val_split))


def _taken(stream: Any, number: int | None) -> Dataset:
    rows = list(_explained(itertools.islice(stream, number)))
    return Dataset.from_list(rows, features=stream.features)


def open_streams(args: DataArguments) -> dict[str, Any]:
    """`datasets.IterableDataset`s by split, images undecoded.

    Raises:
        UserError: there is no such data, it cannot be streamed, or has no training split.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    found: dict[str, Any] = {}
    if args.dataset_name:
        found = {standard_name(k): v for k, v in _named(args).items()}
    for name, file in files.items():
        if file:
            found[name] = _tables({name: matching(file, f"{name}_file")}, f"{name}_file", args)[name]
    if "train" not in found:
        raise UserError(f"dataset_name: {args.dataset_name!r} has no train split, only {', '.join(found)}.")
    return {name: _undecoded(stream) for name, stream in found.items()}


def _undecoded(stream: Any) -> Any:
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, Image):
            stream = stream.cast_column(column, Image(decode=False))
    return stream


def _named(args: DataArguments) -> dict[str, Any]:
    name = str(args.dataset_name)
    path = Path(name).expanduser()
    if args.in_memory is not None or name.startswith("bundled:") or (path / "dataset_info.json").is_file():
        raise UserError("streaming: this data is on the disk or in memory already.", "Leave streaming out.")
    if (path / "dataset_dict.json").is_file():
        raise UserError("streaming: what save_to_disk wrote is on the disk already.", "Leave streaming out.")
    if path.is_dir():
        if tables := split_files(path):
            return _tables(tables, "dataset_name", args)
        return dict(datasets.load_dataset("imagefolder", data_files=split_folders(path), streaming=True))
    if path.is_file() or is_pattern(name):
        return _tables({"train": matching(name, "dataset_name")}, "dataset_name", args)
    if path.suffix.lower() in FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"dataset_name: there is no file or folder {name!r}.")
    hub_client.find("dataset_name", name, "dataset")
    try:
        return dict(datasets.load_dataset(name, args.dataset_config_name, streaming=True))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"dataset_name: {name!r} cannot be streamed ({one_line(error)}).") from error


def _tables(files: dict[str, list[str]], key: str, args: DataArguments) -> dict[str, Any]:
    paths = [Path(p).expanduser() for names in files.values() for p in names]
    kind = FORMATS.get(paths[0].suffix.lower())
    if kind is None:
        raise UserError(f"{key}: {str(paths[0])!r} is not a {', '.join(FORMATS)} file.")
    if missing := [p for p in paths if not p.is_file()]:
        raise UserError(f"{key}: there is no file {str(missing[0])!r}.")
    listed = {split: [Path(p).expanduser() for p in names] for split, names in files.items()}
    options = table_options(kind, listed, args)
    streams = dict(datasets.load_dataset(kind, streaming=True, **options))
    return {name: _with_features(stream, paths[0], args) for name, stream in streams.items()}


def _with_features(stream: Any, file: Path, args: DataArguments) -> Any:
    """A stream whose columns have kinds: those of its first rows, which later ones must have too.

    Raises:
        UserError: they are paths of images.
    """
    rows = list(_explained(itertools.islice(_undecoded(stream), LOOK_IMAGES)))
    first = Dataset.from_list(rows, features=stream.features) if rows else None
    if first is not None and with_images(first, file, args) is not first:
        raise UserError("streaming: the images that a table names are on the disk already.", "Leave streaming out.")
    return stream if stream.features is not None or first is None else stream.cast(first.features)


def _explained(rows: Iterator[Any]) -> Iterator[Any]:
    """The rows; what `datasets` raises for a file that cannot be read, as an error that is meant for a person."""
    try:
        yield from rows
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        cause = error.__cause__ or error
        raise UserError(f"The stream cannot be read on ({one_line(cause, 200)}).") from error


# ---- training ------------------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A training set without an end: pass after pass over a stream, each in another order, given by the seed.

    Each worker reads its own shards (files). No pass holds more than the shuffle buffer.
    """

    def __init__(self, source: Any, read: Reader, seed: int, buffer: int):
        self.source, self.read, self.seed, self.buffer = source, read, seed, buffer

    @property
    def shards(self) -> int:
        """How many workers can read at once."""
        return int(self.source.num_shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            source = self.source
            if self.buffer > 1:
                source = source.shuffle(seed=self.seed * 1_000_003 + turn, buffer_size=self.buffer)
            rows, is_empty = _explained(iter(source)), True
            while batch := list(itertools.islice(rows, _BATCH)):
                for made in self.read(batch, turn):
                    is_empty = False
                    yield made
            if is_empty:  # a worker without a shard, or nothing that can be used
                return


@dataclass
class Reader:
    """From rows of a stream to training examples.

    Attributes:
        inputs: the input columns.
        features: of the stream.
        labels: problem type and classes.
        args: the data keys, with the label column named.
        held: marks of the examples that are held out.
        read: an input as the task reads it; a `ValueError` says that it is broken.
        change: from a batch of them to what the model reads: see `Task.change`.
    """

    inputs: tuple[str, ...]
    features: Features
    labels: Labels
    args: DataArguments
    held: frozenset[bytes]
    read: Callable[[Any], Any]
    change: Change
    seen: int = 0
    bad: int = 0

    def __call__(self, rows: Sequence[dict[str, Any]], turn: int) -> Iterator[dict[str, Any]]:
        """Examples of `rows`, but for those that are held out.

        Raises:
            UserError: one cannot be used, and `on_bad_example` does not skip it; or too many were skipped.
        """
        good: dict[str, list[Any]] = {name: [] for name in (*self.inputs, LABELS, EXAMPLE)}
        for row, (label, why) in zip(rows, self._labels(rows), strict=True):
            raw = [row[c] for c in self.inputs]
            marked = mark(raw)
            if marked in self.held:
                continue
            values, why = ([], why) if why else self._values(raw)
            self.seen += 1
            if why:
                self._skip(raw, why)
                continue
            for column, value in zip(self.inputs, values, strict=True):
                good[column].append(value)
            good[LABELS].append(label)
            number = int.from_bytes(content_hash(marked, str(turn).encode()), "little") >> 1
            good[EXAMPLE].append(number)  # what its random changes depend on: itself and the pass
        if good[LABELS]:
            made = self.change(good)
            for i in range(len(good[LABELS])):
                yield {name: column[i] for name, column in made.items()}

    def _values(self, raw: Sequence[Any]) -> tuple[list[Any], str]:
        if all(v is None or (isinstance(v, str) and not v.strip()) for v in raw):
            return [], "there is no text" if isinstance(raw[0], str) else "there is none"
        try:
            return [self.read(value) for value in raw], ""
        except ValueError as error:
            return [], str(error)

    def _labels(self, rows: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
        """(as a number, why not) of each row's label."""
        given = self.args.label_column_name
        columns = [given] if isinstance(given, str) else list(given or [])
        table = Dataset.from_list(
            [{c: row[c] for c in columns} for row in rows], features=Features({c: self.features[c] for c in columns})
        )
        splits, column = find_labels({"train": table}, (), self.args)
        split = splits["train"]
        wrong = bad_labels(split, "train", column, self.labels)
        right = [i for i in range(len(rows)) if i not in wrong]
        if not right:
            return [(None, wrong[i]) for i in range(len(rows))]
        numbers = iter(encode(split.select(right), "train", column, self.labels)[LABELS][:])
        return [(None, wrong[i]) if i in wrong else (next(numbers), "") for i in range(len(rows))]

    def _skip(self, raw: Sequence[Any], why: str) -> None:
        cell = raw[0]
        name = cell.get("path") if isinstance(cell, dict) else cell
        named = repr(str(name)[:40]) if name else "without a name"
        if self.args.on_bad_example != "skip":
            raise UserError(
                f"An example of the stream, {named}, cannot be used: {why}.",
                "Mend it, or leave such examples out with on_bad_example: skip.",
            )
        self.bad += 1
        if self.bad <= _SAID:
            sys.stderr.write(f"hf-transfer: skipped an example of the stream, {named}: {why}.\n")
        if self.seen >= _ENOUGH and self.bad > self.args.max_bad_fraction * self.seen:
            raise UserError(
                f"max_bad_fraction: {self.bad:,} of {self.seen:,} examples of the stream cannot be used.",
                "Look at the data, or raise max_bad_fraction.",
            )


def mark(values: Sequence[Any]) -> bytes:
    """What an example is known by, wherever it comes in a stream: its content, or its path where that is a file's."""
    parts = []
    for value in values:
        cell = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        parts.append(cell if isinstance(cell, bytes) else str(cell).encode("utf-8", "surrogatepass"))
    return content_hash(*parts)


def held_out(data: Data) -> frozenset[bytes]:
    """The marks of what validates and tests."""
    found: set[bytes] = set()
    for split in (data.validation, data.test):
        if split is not None:
            with contextlib.closing(undecoded(split, data.inputs).iter(batch_size=1000)) as batches:
                for batch in batches:
                    found |= {mark(row) for row in zip(*(batch[c] for c in data.inputs), strict=True)}
    return frozenset(found)
