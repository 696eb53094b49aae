"""The order of a stream: the classes have to be mixed, because its beginning stands for the whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.errors import UserError

_SHARDS = 64  # of a streamed image folder: at most as many workers can read it
_MIN_SORTED = 100  # examples from which an order is no coincidence


def interleaved(split: Dataset) -> Any:
    """An image folder as a stream in which every class is spread evenly; it begins with an image of each class."""
    column = next((name for name, feature in split.features.items() if isinstance(feature, ClassLabel)), None)
    if column is not None:
        labels = np.array(split[column][:])
        position = np.empty(len(labels))
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            position[rows] = np.arange(len(rows)) / len(rows)
        split = split.select(np.argsort(position, kind="stable"))
    return split.to_iterable_dataset(num_shards=min(_SHARDS, len(split)))


def check_order(beginning: Dataset, is_whole: bool, args: DataArguments) -> None:
    """Check that a stream is not sorted by class.

    Args:
        beginning: its first examples.
        is_whole: whether they are all of it.
        args: data keys.

    Raises:
        UserError: it is sorted, and the shuffle buffer cannot mix the classes.
    """
    column = _class_column(beginning, args)
    if column is None:
        return
    runs = [(label, len(list(same))) for label, same in groupby(beginning[column][:])]
    names = list(dict.fromkeys(label for label, _ in runs))
    is_sorted = len(runs) == len(names) and len(beginning) >= max(_MIN_SORTED, 2 * len(names))
    if not is_sorted or (is_whole and len(names) == 1):
        return
    found = _shown(names[:3], beginning.features[column])
    if not is_whole:
        raise UserError(
            f"streaming: the data is sorted by class: its first {len(beginning):,} examples are {found}.",
            "They stand for the whole: the classes and the validation examples are taken from them. Write the data in "
            "random order, or remove streaming.",
        )
    longest = max(length for _, length in runs)
    if longest > args.shuffle_buffer_size:
        raise UserError(
            f"shuffle_buffer_size: the data is sorted by class ({found}), so that training would see one class after "
            "the other.",
            f"Set shuffle_buffer_size to {len(beginning):,}, or write the data in random order.",
        )


def _class_column(split: Dataset, args: DataArguments) -> str | None:
    """The column with one class per example, if it is clear without knowing the task."""
    given = args.label_column_name
    names = [given] if isinstance(given, str) else ["label", "labels"] if not given else []
    column = next((name for name in names if name in split.features), None)
    feature = split.features.get(column) if column else None
    is_class = isinstance(feature, ClassLabel | Value) and not feature.dtype.startswith(("float", "double"))
    return column if is_class and not args.label_delimiter else None


def _shown(labels: Sequence[Any], feature: Any) -> str:
    shown = [feature.int2str(v) if isinstance(feature, ClassLabel) and v not in (None, -1) else v for v in labels]
    return f"all {shown[0]!r}" if len(shown) == 1 else f"in the order {', '.join(map(repr, shown))}"
