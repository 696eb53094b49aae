"""Data given as Python objects: `datasets` datasets, pandas DataFrames and the other tables of `forms`."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image
from PIL import Image as Pixels

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.forms import columns_of, is_column, is_frame, is_table, plain_cells
from hf_transfer.data.image_paths import with_images
from hf_transfer.data.images import open_image
from hf_transfer.data.split_names import standard_name
from hf_transfer.errors import UserError, one_line

_MODES_OF_PNG = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))


def splits_of(data: Any, args: DataArguments | None = None, name: str = "train") -> DatasetDict:
    """Splits from a `Dataset`, a `DatasetDict`, a pandas DataFrame, a dict of columns, a list of dicts, a tuple of
    inputs and labels, or a mapping from split names to any of these.

    A categorical column becomes a class column in the order of its categories; cells holding images become an image
    column, and so does a column of image paths, as in a table (see `image_paths`); those are relative to the working
    directory.

    Args:
        data: the splits.
        args: data keys, which may name the image column or the task, and name the columns of a tuple.
        name: the split of data that names none.

    Raises:
        UserError: unsupported type, a mapping without split names, a column whose name is not a string, or columns of
            different lengths.
    """
    args = args or DataArguments()
    named = data if _names_splits(data) else {name: data}
    if not named or not all(isinstance(name, str) for name in named):
        raise UserError(
            "dataset: the keys of a mapping must be split names.", 'Pass, for example, {"train": …, "test": …}.'
        )
    splits = {standard_name(name): _split_of(split, name, args) for name, split in named.items()}
    here = Path("in memory")  # as if the table were a file in the working directory
    return DatasetDict({name: with_images(split, here, args) for name, split in splits.items()})


def _names_splits(data: Any) -> bool:
    """Whether it is a mapping from split names to tables, not from column names to columns."""
    if not isinstance(data, Mapping):
        return False
    return all(map(is_table, data.values())) or not all(map(is_column, data.values()))


def _split_of(split: Any, name: str, args: DataArguments) -> Dataset:
    if isinstance(split, Dataset):
        return split.with_format(None)  # rows are read as plain Python values
    if is_frame(split):
        return _from_frame(split, name)
    if is_table(split):
        import pandas

        columns = {column: plain_cells(values) for column, values in columns_of(split, args).items()}
        return _from_frame(pandas.DataFrame(columns), name)
    raise UserError(
        f"dataset: unsupported type {type(split).__name__} for the {name} split.",
        "Pass a datasets.Dataset, a DatasetDict, a pandas.DataFrame, a dict of columns, a list of dicts, a tuple of "
        "inputs and labels, or a dict from split names to these.",
    )


def _from_frame(frame: Any, name: str) -> Dataset:
    import pyarrow

    invalid = [c for c in frame.columns if not isinstance(c, str)]
    if invalid:
        raise UserError(
            f"dataset: column name {invalid[0]!r} of the {name} data is not a string.", "Rename the column."
        )
    classes = {c: list(frame[c].cat.categories) for c in frame.columns if frame[c].dtype.name == "category"}
    images = {c: _image_cells(frame[c], c, name) for c in frame.columns if _holds_images(frame[c])}
    plain = frame.assign(**{c: frame[c].astype(frame[c].cat.categories.dtype) for c in classes}).drop(columns=[*images])
    paths = [c for c in plain.columns if isinstance(_first(plain[c]), PurePath)]
    plain = plain.assign(**{c: [None if _is_missing(v) else str(v) for v in plain[c]] for c in paths})
    try:
        dataset = Dataset.from_pandas(plain, preserve_index=False)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # arrays, which `from_dict` can encode
        dataset = _from_columns(plain, name)
    for column, cells in images.items():
        dataset = dataset.add_column(column, cells, feature=Image())
    for column, names in classes.items():
        if all(isinstance(n, str) for n in names) and column in dataset.features:
            dataset = dataset.cast_column(column, ClassLabel(names=names))
    return dataset.select_columns(list(frame.columns))


def _from_columns(frame: Any, name: str) -> Dataset:
    """Raises:
    UserError: a column holds several kinds of values.
    """
    import pyarrow

    try:
        return Dataset.from_dict(frame.to_dict("list"))
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        for column in frame.columns:
            kinds = sorted({type(v).__name__ for v in frame[column] if not _is_missing(v)})
            if len(kinds) > 1:
                raise UserError(
                    f"dataset: column {column!r} of the {name} data mixes {' and '.join(kinds)}.",
                    "Make them one kind, for example all of them strings.",
                ) from error
        raise UserError(f"dataset: the {name} data cannot be read ({one_line(error, 150)}).") from error


# ---- cells that hold images ----


def _holds_images(column: Any) -> bool:
    first = _first(column)
    return isinstance(first, Pixels.Image) or (isinstance(first, np.ndarray) and first.ndim > 1)


def _first(column: Any) -> Any:
    """The first value that is there, in a column of Python objects."""
    return next((v for v in column if not _is_missing(v)), None) if column.dtype == object else None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _image_cells(column: Any, name: str, split: str) -> list[dict[str, Any] | None]:
    """The images of a column as `datasets` stores them, upright and without loss.

    `datasets` would drop the orientation of a PIL image, and compress what was a JPEG a second time.

    Raises:
        UserError: a cell holds no image.
    """
    cells = []
    for row, value in enumerate(column):
        try:
            cells.append(None if _is_missing(value) else {"path": None, "bytes": _lossless(open_image(value))})
        except ValueError as error:
            raise UserError(f"dataset: row {row} of column {name!r} of the {split} data {error}.") from error
    return cells


def _lossless(image: Any) -> bytes:
    content = BytesIO()
    if image.mode in _MODES_OF_PNG:
        image.save(content, "PNG", compress_level=1)
    else:
        image.save(content, "TIFF")
    return content.getvalue()
