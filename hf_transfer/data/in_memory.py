"""Data given as Python objects: `datasets` datasets, pandas DataFrames and the other tables of `forms`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pixels

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.columns import TEXT_NAMES
from hf_transfer.data.forms import columns_of, is_column, is_frame, is_table, plain_cells
from hf_transfer.data.image_paths import with_images
from hf_transfer.data.images import open_image, undecoded
from hf_transfer.data.label_cells import name_of
from hf_transfer.data.labels import REGRESSION
from hf_transfer.data.raw import RawSplits
from hf_transfer.data.split_names import standard_name
from hf_transfer.errors import UserError, one_line

_MOST_LOOKED_AT = 1000  # images of a column
_MODES_OF_PNG = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))


def splits_of(data: Any, args: DataArguments | None = None, name: str = "train") -> RawSplits:
    """Splits from a `Dataset`, a `DatasetDict`, a pandas DataFrame, a dict of columns, a list of dicts, a tuple of
    inputs and labels, or a mapping from split names to any of these.

    A categorical column becomes a class column in the order of its categories (numbers where `problem_type` is
    regression, texts where it is the text column); cells holding images become an image
    column, and so does a column of image paths, as in a table (see `image_paths`); those are relative to the working
    directory.

    Args:
        data: the splits.
        args: data keys, which may name the image column or the task, and name the columns of a tuple.
        name: the split of data that names none.

    Raises:
        UserError: unsupported type, a mapping without split names, columns of different lengths, or a column whose name
            is not a string, occurs twice or holds what a dataset cannot.
    """
    args = args or DataArguments()
    named = data if _names_splits(data) else {name: data}
    if not named or not all(isinstance(name, str) for name in named):
        raise UserError(
            "dataset: the keys of a mapping must be split names.", 'Pass, for example, {"train": …, "test": …}.'
        )
    splits = {standard_name(name): _split_of(split, name, args) for name, split in named.items()}
    here = Path("in memory")  # as if the table were a file in the working directory
    splits = {name: with_images(split, here, args) for name, split in splits.items()}
    given = [splits[standard_name(name)] for name, split in named.items() if isinstance(split, Dataset)]
    return RawSplits(splits, [note for split in given for note in _encoded_again(split)])


def _names_splits(data: Any) -> bool:
    """Whether it is a mapping from split names to tables, not from column names to columns."""
    if not isinstance(data, Mapping):
        return False
    return all(map(is_table, data.values())) or not all(map(is_column, data.values()))


def _split_of(split: Any, name: str, args: DataArguments) -> Dataset:
    if isinstance(split, Dataset):
        return split.with_format(None)  # rows are read as plain Python values
    if is_frame(split):
        return _from_frame(split, name, args)
    if is_table(split):
        import pandas

        columns = {column: plain_cells(values) for column, values in columns_of(split, args).items()}
        return _from_frame(pandas.DataFrame(columns), name, args)
    raise UserError(
        f"dataset: unsupported type {type(split).__name__} for the {name} split.",
        "Pass a datasets.Dataset, a DatasetDict, a pandas.DataFrame, a dict of columns, a list of dicts, a tuple of "
        "inputs and labels, or a dict from split names to these.",
    )


def _from_frame(frame: Any, name: str, args: DataArguments) -> Dataset:
    import pyarrow

    invalid = [c for c in frame.columns if not isinstance(c, str)]
    if invalid:
        raise UserError(
            f"dataset: column name {invalid[0]!r} of the {name} data is not a string.", "Rename the column."
        )
    if repeated := [c for c, is_repeated in zip(frame.columns, frame.columns.duplicated(), strict=True) if is_repeated]:
        raise UserError(f"dataset: the {name} data has several columns called {repeated[0]!r}.", "Rename them.")
    categorical = [c for c in frame.columns if frame[c].dtype.name == "category"]
    classes = {c: names for c in categorical if (names := _class_names(frame[c], args))}
    images = {c: _image_cells(frame[c], c, name) for c in frame.columns if _holds_images(frame[c])}
    plain = frame.assign(**{c: frame[c].astype(object) for c in categorical}).drop(columns=[*images, *classes])
    paths = [c for c in plain.columns if isinstance(_first(plain[c]), PurePath)]
    plain = plain.assign(**{c: [None if _is_missing(v) else str(v) for v in plain[c]] for c in paths})
    try:
        dataset = Dataset.from_pandas(plain, preserve_index=False)
    except (pyarrow.ArrowException, TypeError, ValueError):  # arrays and sparse columns, which `from_dict` can encode
        dataset = _from_columns(plain, name)
    for column, cells in images.items():
        dataset = _with_column(dataset, column, cells, Image())
    for column, names in classes.items():
        codes = [None if code < 0 else int(code) for code in frame[column].cat.codes]
        dataset = _with_column(dataset, column, codes, ClassLabel(names=names))
    return dataset.select_columns(list(frame.columns))


def _with_column(dataset: Dataset, column: str, cells: list[Any], feature: Any) -> Dataset:
    if dataset.column_names:
        return dataset.add_column(column, cells, feature=feature)
    return Dataset.from_dict({column: cells}, features=Features({column: feature}))


def _class_names(column: Any, args: DataArguments) -> list[str]:
    """The categories of a column as names of classes; none if they are the texts, or the numbers of a regression."""
    texts = [args.text_column_name] if isinstance(args.text_column_name, str) else args.text_column_name or []
    is_numeric = column.cat.categories.dtype.kind in "iuf"
    if column.name in (*TEXT_NAMES, *texts) or (is_numeric and args.problem_type == REGRESSION):
        return []
    kinds = {type(value) for value in column.cat.categories}
    return [name_of(value) for value in column.cat.categories] if len(kinds) == 1 else []


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
            try:
                Dataset.from_dict({column: list(frame[column])})
            except (pyarrow.ArrowException, TypeError, ValueError):
                raise UserError(
                    f"dataset: column {column!r} of the {name} data holds {kinds[0]} values, which a dataset "
                    f"cannot hold ({one_line(error, 100)}).",
                    f"Convert it, for example with frame[{column!r}].astype(str), or leave it out.",
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


def _encoded_again(split: Dataset) -> list[str]:
    """Notes on images that `datasets` has encoded from PIL images: their rotation by EXIF data, if they had any, is
    lost before anyone else sees them."""
    notes = []
    for column in (name for name, feature in split.features.items() if isinstance(feature, Image)):
        cells = undecoded(split.select(range(min(len(split), _MOST_LOOKED_AT))), [column])[column]
        again = sum(cell is not None and not cell.get("path") and _is_from_pil(cell.get("bytes")) for cell in cells)
        if again:
            notes.append(
                f"Column {column!r}: {again:,} of {len(cells):,} images looked at are JPEGs as `datasets` encodes PIL "
                "images, without EXIF data: photos may lie on their side. Give a DataFrame of them, or paths."
            )
    return notes


def _is_from_pil(content: bytes | None) -> bool:
    """Whether Pillow has written a JPEG with its default quality, and without EXIF data."""
    if not content or not content.startswith(b"\xff\xd8"):
        return False
    try:
        image: Any = Pixels.open(BytesIO(content))
    except OSError:
        return False
    return image.quantization == _usual_quantization(image.mode) and not image.getexif()


@cache
def _usual_quantization(mode: str) -> dict[int, list[int]]:
    content = BytesIO()
    Pixels.new(mode, (8, 8)).save(content, "JPEG")
    image: Any = Pixels.open(content)
    return dict(image.quantization)


def _lossless(image: Any) -> bytes:
    content = BytesIO()
    if image.mode in _MODES_OF_PNG:
        image.save(content, "PNG", compress_level=1)
    else:
        image.save(content, "TIFF")
    return content.getvalue()
