"""Forms in which Python holds a table: frames, dicts of columns, lists of rows, and pairs of inputs and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.image_paths import IMAGE_SUFFIXES
from hf_transfer.errors import UserError

PAIR_COLUMNS = ("sentence1", "sentence2")


def is_frame(value: Any) -> bool:
    """Whether it is a pandas DataFrame."""
    return type(value).__module__.split(".")[0] == "pandas" and hasattr(value, "columns")


def is_column(value: Any, dims: Sequence[int] = (1, 2, 3, 4)) -> bool:
    """Whether it holds a value per row: a list, a Series, a column of a dataset, or an array of `dims` dimensions."""
    if isinstance(value, np.ndarray):
        return value.ndim in dims
    if isinstance(value, str | bytes | bytearray | Mapping | tuple) or is_frame(value) or _is_dataset(value):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not hasattr(value, "__array_interface__")


def is_pair(value: Any) -> bool:
    """Whether it is a tuple of inputs and labels, as scikit-learn takes them."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    inputs, labels = value
    return (is_frame(inputs) or isinstance(inputs, Mapping) or is_column(inputs)) and is_column(labels)


def is_rows(value: Any) -> bool:
    """Whether it is a list of dicts."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def is_table(value: Any) -> bool:
    """Whether it can be the data of one split."""
    is_columns = isinstance(value, Mapping) and bool(value) and all(map(is_column, value.values()))
    return is_frame(value) or _is_dataset(value) or is_rows(value) or is_columns or is_pair(value)


def rows_of_columns(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a dict of columns.

    Raises:
        UserError: the columns differ in length.
    """
    check_lengths(columns)
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def check_lengths(columns: Mapping[str, Any]) -> None:
    """Raises:
    UserError: the columns differ in length.
    """
    if len({len(values) for values in columns.values()}) > 1:
        shown = ", ".join(f"{name} {len(values):,}" for name, values in columns.items())
        raise UserError(f"the columns differ in length: {shown}.", "Give a value for every row.", key="dataset")


def columns_of(value: Any, args: DataArguments) -> dict[str, Any]:
    """The columns of rows, of a dict of columns, or of a pair.

    Args:
        value: see `is_table`.
        args: data keys; they name the columns of a pair.

    Raises:
        UserError: the columns differ in length.
    """
    if is_rows(value):
        names = dict.fromkeys(name for row in value for name in row)
        return {name: [row.get(name) for row in value] for name in names}
    if is_pair(value):
        inputs, labels = value
        label = args.label_column_name if isinstance(args.label_column_name, str) else "label"
        value = {**_input_columns(inputs, args), label: labels}
    check_lengths(value)
    return dict(value)


def _input_columns(inputs: Any, args: DataArguments) -> dict[str, Any]:
    """The inputs of a pair under the names that the data keys give them, else the usual ones."""
    if is_frame(inputs):
        return {name: inputs[name] for name in inputs.columns}
    if isinstance(inputs, Mapping):
        return dict(inputs)
    first = next((v for v in inputs if v is not None), None)
    if isinstance(first, tuple) or (isinstance(first, list) and len(first) == 2):
        given = args.text_column_name if isinstance(args.text_column_name, list) else PAIR_COLUMNS
        return {name: [row[i] for row in inputs] for i, name in enumerate(given)}
    if _is_image(first, args):
        return {args.image_column_name or "image": inputs}
    return {args.text_column_name if isinstance(args.text_column_name, str) else "text": inputs}


def _is_image(value: Any, args: DataArguments) -> bool:
    """Whether an input is an image or the path of one."""
    if not isinstance(value, str):
        return value is not None
    if args.task is not None:
        return args.task == "image-classification"
    is_name = not any(c.isspace() for c in value) and PurePath(value).suffix.lower() in IMAGE_SUFFIXES
    return is_name or args.image_column_name is not None


def plain_cells(values: Any) -> Any:
    """A column as pandas takes it, without guessing a type from it: a Series as it is, else an array of objects."""
    if hasattr(values, "iloc"):
        return values.reset_index(drop=True)
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind not in "OUS":
        return values
    array = hasattr(values, "ndim") and values.ndim in (1, 2) and hasattr(values, "tolist")
    listed = values.tolist() if array else list(values)
    cells = np.empty(len(listed), dtype=object)
    for i, value in enumerate(listed):  # assigned at once, arrays of one shape would become a larger one
        cells[i] = value
    return cells


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "column_names") and hasattr(value, "features")
