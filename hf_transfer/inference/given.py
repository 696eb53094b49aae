"""What `predict` is given in Python: texts, paths, images, rows, and whatever holds several of them, as a stream.

Nothing is held but the example at hand. Files are read by the reader of the command line (`inputs`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Value

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.forms import is_column, is_frame, rows_of_columns
from hf_transfer.data.image_paths import IMAGE_SUFFIXES
from hf_transfer.errors import UserError
from hf_transfer.inference.inputs import LINES, TABLES, Example, check_inputs, example, read_inputs
from hf_transfer.tasks.base import Task

_ENDINGS = (*TABLES, *LINES, *IMAGE_SUFFIXES)
_MOST_CHANNELS = 4  # an array of (height, width, up to so many) is one image


def items_of(inputs: Any, is_pair: bool) -> Iterator[Any]:
    """The inputs that `Predictor.predict` is given, one by one.

    Args:
        inputs: see `Predictor.predict`.
        is_pair: whether a tuple, or a list of two inside a list, is one input.

    Raises:
        UserError: they are the splits of a dataset, or columns of different lengths.
    """
    if isinstance(inputs, str | bytes | bytearray | os.PathLike) or (isinstance(inputs, tuple) and is_pair):
        yield inputs
    elif isinstance(inputs, Mapping):
        yield from _rows_of_mapping(inputs)
    elif isinstance(inputs, np.ndarray):
        yield from _rows_of_array(inputs)
    elif is_frame(inputs):
        yield from inputs.to_dict("records")
    elif hasattr(inputs, "__iter__") and not hasattr(inputs, "__array_interface__"):  # an image of PIL has that
        for item in inputs:
            yield from _inside(item, is_pair)
    else:
        yield inputs


def _inside(item: Any, is_pair: bool) -> Iterator[Any]:
    """The inputs that one element of several stands for: itself, or what a frame, an array or a generator holds."""
    if isinstance(item, list) and is_pair and len(item) == 2:
        yield tuple(item)
    elif isinstance(item, tuple | list):
        yield item
    else:
        yield from items_of(item, is_pair)


def _rows_of_mapping(row: Mapping[str, Any]) -> Iterator[Any]:
    """A row, or the rows of a dict of columns."""
    if row and all(hasattr(value, "column_names") for value in row.values()):
        raise UserError(
            f"the splits {', '.join(row)} of a dataset were given.", f"Give one of them: data[{next(iter(row))!r}]."
        )
    are_columns = bool(row) and all(is_column(value, dims=(1, 4)) for value in row.values())
    yield from rows_of_columns(row) if are_columns else [row]


def _rows_of_array(array: np.ndarray[Any, Any]) -> Iterator[Any]:
    """Texts (rows of two are pairs), objects, or images of (N, height, width) or (N, height, width, channels)."""
    if array.dtype.kind in "OUS":
        yield from (tuple(row) if isinstance(row, list) else row for row in np.atleast_1d(array).tolist())
        return
    several = array.ndim == 4 or (array.ndim == 3 and array.shape[2] > _MOST_CHANNELS)
    yield from array if several else [array]


def _names_file(value: Any) -> bool:
    """Whether a text is the name of an existing file that holds inputs."""
    if not isinstance(value, str) or not value.lower().endswith(_ENDINGS):
        return False
    return os.path.isfile(value)


@dataclass(frozen=True)
class Reader:
    """Reads inputs as examples of a model.

    Attributes:
        task: what the model reads.
        args: the data keys of its run.
        columns: the input columns that it was trained on; empty where that is not known.
    """

    task: Task
    args: DataArguments
    columns: tuple[str, ...]

    def examples(self, inputs: Any) -> Iterator[tuple[str, Example]]:
        """(where it stands, the example) of every input, in order; of a file or folder, of everything in it.

        Raises:
            UserError: a file is missing or of a kind that the model does not read, or a word could be a text or a
                folder.
        """
        alone = isinstance(inputs, str)
        for i, item in enumerate(items_of(inputs, len(self.columns) == 2)):
            place = f"inputs[{i}]"
            if isinstance(item, str | os.PathLike) and self._is_path(item, place, alone):
                for read in self._of_path(os.fspath(item), place):
                    yield f"{place}: {read.shown!r}", read
            else:
                yield place, self._of_value(item, place)

    def _is_path(self, item: str | os.PathLike[str], place: str, alone: bool) -> bool:
        """Whether an input is to be read from the disk; a text that only looks like a path is a text."""
        if not isinstance(item, str):
            return True
        if not os.path.isdir(item):  # os.path takes any text; pathlib stumbles over a long one
            return os.path.isfile(item)
        if alone or self.task.suffixes or len(self.columns) == 2:
            return True
        if not any(c.isalnum() for c in item):  # `/` and `.`
            return False
        if os.path.basename(item) == item:
            raise UserError(
                f"{item!r} could be a text, and there is a folder of that name here.",
                f'Pass Path({item!r}) to read the folder, or {{"{self.columns[0] if self.columns else "text"}": '
                f"{item!r}}} for the text.",
                key=place,
            )
        return True

    def _of_path(self, path: str, place: str) -> Iterator[Example]:
        """Raises:
        UserError: it does not exist, or cannot be read.
        """
        try:
            if not os.path.exists(path):
                raise UserError(f"there is no file or folder {path!r}.")
            check_inputs([path], self.task)
            yield from (read for read in read_inputs([path], self.task, self.args) if read is not None)
        except UserError as error:
            raise (error if error.key not in ("", "INPUT") else error.with_key(place)) from error

    def _of_value(self, item: Any, place: str) -> Example:
        """The example of a text, an image, a tuple of columns or a row.

        Raises:
            UserError: a text of a row is the name of a file.
        """
        columns, is_row = self.columns, isinstance(item, Mapping)
        if isinstance(item, Mapping) and columns and all(c in item for c in columns):
            item = tuple(item[c] for c in columns)
        elif isinstance(item, Mapping) and not columns and "bytes" not in item:  # how `datasets` stores an image
            texts = {k: Value("string") for k, v in item.items() if isinstance(v, str)}
            inputs = self.task.input_columns(texts, self.args)
            item = tuple(item[c] for c in inputs) if inputs else item
        item = item[0] if isinstance(item, tuple) and len(item) == 1 else item
        raw = list(item) if isinstance(item, tuple) else [item]
        if is_row and not self.task.suffixes and (name := next(filter(_names_file, raw), None)):
            raise UserError(
                f"{name!r} is the name of a file, and stands in a column of texts.",
                "Pass the paths alone to read the files: frame['column'], not the frame.",
                key=place,
            )
        return example(self.task, raw if len(raw) > 1 else item, raw)
