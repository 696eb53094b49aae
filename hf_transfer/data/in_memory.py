"""Data that is a Python object: `datasets` objects and pandas frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict

from hf_transfer.data.load import standard_name
from hf_transfer.errors import UserError


def splits_of(data: Any) -> DatasetDict:
    """A `Dataset`, a `DatasetDict`, a pandas frame, or a mapping of split names to such, as splits.

    A frame's categories become classes in their order; pictures in its cells become an image column.

    Raises:
        UserError: it is something else.
    """
    named = data if isinstance(data, Mapping) else {"train": data}
    if not named or not all(isinstance(name, str) for name in named):
        raise UserError("dataset: the splits of a mapping need names.", "Name one of them train.")
    return DatasetDict({standard_name(name): _split_of(split, name) for name, split in named.items()})


def _split_of(split: Any, name: str) -> Dataset:
    if isinstance(split, Dataset):
        return split.with_format(None)  # tensors and arrays are for a model, not for what reads rows
    if type(split).__module__.split(".")[0] == "pandas" and hasattr(split, "columns"):
        return _from_frame(split, name)
    raise UserError(
        f"dataset: the {name} split is a {type(split).__name__}.",
        "Give a datasets.Dataset, a DatasetDict, a pandas.DataFrame, or a dict of them by split.",
    )


def _from_frame(frame: Any, name: str) -> Dataset:
    import pyarrow

    wrong = [c for c in frame.columns if not isinstance(c, str)]
    if wrong:
        raise UserError(f"dataset: the {name} frame has a column {wrong[0]!r}, whose name is not a text.", "Rename it.")
    classes = {c: list(frame[c].cat.categories) for c in frame.columns if frame[c].dtype.name == "category"}
    plain = frame.assign(**{c: frame[c].astype(frame[c].cat.categories.dtype) for c in classes})
    try:
        made = Dataset.from_pandas(plain, preserve_index=False)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # pictures and arrays, which `datasets` knows to encode
        made = Dataset.from_dict(plain.to_dict("list"))
    for column, names in classes.items():
        if all(isinstance(n, str) for n in names) and column in made.features:
            made = made.cast_column(column, ClassLabel(names=names))
    return made
