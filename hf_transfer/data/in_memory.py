"""Data given as Python objects: `datasets` datasets and pandas DataFrames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict

from hf_transfer.data.split_names import standard_name
from hf_transfer.errors import UserError


def splits_of(data: Any) -> DatasetDict:
    """Splits from a `Dataset`, a `DatasetDict`, a pandas DataFrame, or a mapping from split names to any of these.

    A categorical column becomes a class column in the order of its categories; cells holding images become an image
    column.

    Raises:
        UserError: unsupported type, a mapping without split names, or a column whose name is not a string.
    """
    named = data if isinstance(data, Mapping) else {"train": data}
    if not named or not all(isinstance(name, str) for name in named):
        raise UserError(
            "dataset: the keys of a mapping must be split names.", 'Pass, for example, {"train": …, "test": …}.'
        )
    return DatasetDict({standard_name(name): _split_of(split, name) for name, split in named.items()})


def _split_of(split: Any, name: str) -> Dataset:
    if isinstance(split, Dataset):
        return split.with_format(None)  # rows are read as plain Python values
    if type(split).__module__.split(".")[0] == "pandas" and hasattr(split, "columns"):
        return _from_frame(split, name)
    raise UserError(
        f"dataset: unsupported type {type(split).__name__} for the {name} split.",
        "Pass a datasets.Dataset, a DatasetDict, a pandas.DataFrame, or a dict from split names to these.",
    )


def _from_frame(frame: Any, name: str) -> Dataset:
    import pyarrow

    invalid = [c for c in frame.columns if not isinstance(c, str)]
    if invalid:
        raise UserError(
            f"dataset: column name {invalid[0]!r} of the {name} DataFrame is not a string.", "Rename the column."
        )
    classes = {c: list(frame[c].cat.categories) for c in frame.columns if frame[c].dtype.name == "category"}
    plain = frame.assign(**{c: frame[c].astype(frame[c].cat.categories.dtype) for c in classes})
    try:
        dataset = Dataset.from_pandas(plain, preserve_index=False)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # images and arrays, which `from_dict` can encode
        dataset = Dataset.from_dict(plain.to_dict("list"))
    for column, names in classes.items():
        if all(isinstance(n, str) for n in names) and column in dataset.features:
            dataset = dataset.cast_column(column, ClassLabel(names=names))
    return dataset
