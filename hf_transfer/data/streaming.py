"""Streaming: read the training set while training, for datasets larger than the disk.

The first examples of the stream are read in advance and treated like an ordinary dataset: they determine the columns,
the classes, the data facts and, if there is no validation split, the examples held out for validation. Training then
reads the stream from the start and skips held-out examples wherever they occur.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import datasets
from datasets import Dataset, Features, Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.image_folders import read_image_folder
from hf_transfer.data.locate import Kind, Source, Tables, folder_errors, locate
from hf_transfer.data.raw import BadExample, RawSplits, Streams
from hf_transfer.data.split_names import standard_name
from hf_transfer.data.splits import SHARE
from hf_transfer.data.stream_order import check_order, interleaved
from hf_transfer.data.stream_training import explained_rows
from hf_transfer.data.table_streams import PLACE, REASON, table_stream
from hf_transfer.errors import UserError, one_line

LOOK_TEXTS, LOOK_IMAGES = 10_000, 1_000  # minimum number of examples read in advance
_BATCH = 64  # rows preprocessed at a time
_MAX_REPORTED = 20  # skipped examples that each process reports
_MIN_SEEN = 1_000  # examples after which `max_bad_fraction` applies
Change = Callable[[dict[str, Any]], dict[str, Any]]


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
    return (
        least
        if "validation" in streams
        else max(least, math.ceil(args.max_eval_samples / (args.train_val_split or SHARE)))
    )


def _take(name: str, stream: Any, number: int | None, args: DataArguments) -> tuple[Dataset, list[BadExample]]:
    """(the first rows of a stream, the rows left out).

    Raises:
        UserError: a row does not fit, and such rows are not left out.
    """
    rows, bad = [], list[BadExample]()
    for row in explained_rows(itertools.islice(stream, number)):
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
        opened = _open_tables(tables, args)
        streams[split] = opened[split]
        streams.notes += opened.notes
    for split, folder in source.folders.items():
        raise UserError(
            f"{split}_file: an image folder is not streamed.",
            f"Set dataset_name to the folder that holds {folder.name} and the other splits.",
        )
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
    if source.kind is Kind.NOTHING and args.in_memory is None:
        return Streams({})
    if source.kind in (Kind.IN_MEMORY, Kind.BUNDLED, Kind.SAVED) or args.in_memory is not None:
        raise UserError("streaming: this data is already on disk or in memory.", "Remove streaming.")
    if source.tables is not None:
        return _open_tables(source.tables, args)
    if source.kind is Kind.IMAGE_FOLDER:
        with folder_errors(source.path):
            raw = read_image_folder(source.path, args)
        streams = {name: interleaved(split) for name, split in raw.items()}
        return Streams(streams, raw.notes, raw.written)
    try:
        return Streams(datasets.load_dataset(source.name, args.dataset_config_name, streaming=True))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"dataset_name: {source.name!r} cannot be streamed ({one_line(error)}).") from error


def _open_tables(tables: Tables, args: DataArguments) -> Streams:
    streams = Streams({}, tables.notes)
    for split, paths in tables.paths.items():
        try:
            streams[split], notes = table_stream(paths, args)
        except UserError as error:
            raise (error if error.key else error.with_key(tables.key)) from error
        streams.notes += notes
    return streams
