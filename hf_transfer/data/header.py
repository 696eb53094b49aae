"""Named columns against the columns that there are; of a CSV file before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_transfer.config.places import format_of
from hf_transfer.data.rows import DelimitedFile
from hf_transfer.errors import UserError, nearest

_KEYS = ("label_column_name", "text_column_name", "image_column_name", "split_group_column_name")


def check_column(column: str, columns: Iterable[str], key: str) -> None:
    """Raises:
    UserError: `column`, which `key` names, is not one of `columns`.
    """
    columns = list(columns)
    if column not in columns:
        whole = next((name for name in columns if column in name.split(",")), "")
        comma = f" A name with a comma is written as a list of one: ['{whole}']." if whole else ""
        raise UserError(
            f"column {column!r} does not exist.",
            f"The columns are {', '.join(columns)}.{comma or nearest(column, columns)}",
            key=key,
        )


def check_header(values: Mapping[str, Any]) -> None:
    """Check the columns that the keys name against the header of the training file, if it is one CSV file.

    Args:
        values: every key with its value.

    Raises:
        UserError: a column does not exist, or the file has no header.
    """
    path = Path(str(values["train_file"] or values["dataset_name"] or "")).expanduser()
    named = [(key, values[key]) for key in _KEYS if values[key]]
    if not named or format_of(path) != "csv" or not path.is_file():
        return
    header = DelimitedFile(path, skip_bad=values["on_bad_example"] == "skip").names
    for key, columns in named:
        for column in [columns] if isinstance(columns, str) else columns:
            check_column(column, header, key)
