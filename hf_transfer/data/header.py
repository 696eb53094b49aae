"""Named columns against the columns that there are; of files, before anything slow is imported."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_transfer.config.places import FORMATS, format_of
from hf_transfer.config.table_kind import IMAGES
from hf_transfer.data.rows import BadRow, DelimitedFile, json_rows
from hf_transfer.errors import UserError, nearest

_KEYS = ("label_column_name", "text_column_name", "image_column_name", "split_group_column_name")
# Keys of files, with the columns that such a file needs: a test file may have no labels, and only training has groups.
_FILES = (("validation_file", _KEYS[:3]), ("test_file", _KEYS[1:3]))
_MOST_BYTES = 16 << 20  # of a JSON file, every row of which may have other columns: more take over a second
_MOST_FILES, _MOST_ENTRIES = 20, 1000  # tables of a folder, files of any kind


def check_column(column: str, columns: Iterable[str], key: str, where: str = "") -> None:
    """Check a column that a key names.

    Args:
        column: its name.
        columns: those that there are.
        key: that names it.
        where: what the columns are of, as the end of a sentence; empty for the data as a whole.

    Raises:
        UserError: `column` is not one of `columns`.
    """
    columns = list(columns)
    if column not in columns:
        whole = next((name for name in columns if column in name.split(",")), "")
        comma = f" A name with a comma is written as a list of one: ['{whole}']." if whole else ""
        raise UserError(
            f"column {column!r} does not exist{where}.",
            f"The columns are {', '.join(columns)}.{comma or nearest(column, columns)}",
            key=key,
        )


def check_header(values: Mapping[str, Any]) -> None:
    """Check the columns that the keys name against the files of a run: tables, and folders with tables.

    Files that cannot be read so soon are left to the loader: remote ones, folders with images, large JSON files.

    Args:
        values: every key with its value.

    Raises:
        UserError: a column does not exist, or a file has no header.
    """
    skip_bad = values["on_bad_example"] == "skip"
    train = "train_file" if values["train_file"] else "dataset_name"
    for file, keys in ((train, _KEYS), *_FILES):
        named = [(key, values[key]) for key in keys if values[key]]
        named = [(key, column) for key, of_key in named for column in ([of_key] if isinstance(of_key, str) else of_key)]
        if not named or not values[file]:
            continue
        path = Path(str(values[file])).expanduser()
        columns = _columns(path, {column for _, column in named}, skip_bad)
        for key, column in named if columns else ():
            check_column(column, columns, key, "" if file == train else f" in {file} {str(path)!r}")


def _columns(path: Path, wanted: Collection[str], skip_bad: bool) -> list[str]:
    """The columns of a table, or of the tables of a folder; empty if they are not known so soon.

    Args:
        path: file or folder.
        wanted: names of columns: reading ends where all of them were seen.
        skip_bad: whether bad rows are left out.

    Raises:
        UserError: it is one CSV file without a header.
    """
    if path.is_dir():
        return _columns_of_folder(path, wanted, skip_bad)
    form = format_of(path) if path.is_file() else None
    if form == "csv":
        return DelimitedFile(path, skip_bad).names
    if form == "json":
        return _columns_of_json(path, wanted)
    return _columns_of_parquet(path) if form == "parquet" else []


def _columns_of_json(path: Path, wanted: Collection[str]) -> list[str]:
    """The keys of the objects, up to the one where all wanted ones were seen."""
    if path.stat().st_size > _MOST_BYTES or path.suffix.lower() == ".gz":
        return []
    seen: dict[str, None] = {}
    try:
        for row in json_rows(path, skip_bad=True):
            if not isinstance(row, BadRow):
                seen |= dict.fromkeys(row)
            if seen.keys() >= set(wanted):
                break
    except UserError:  # the loader says what is wrong with it
        return []
    return list(seen)


def _columns_of_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException):  # likewise
        return []


def _columns_of_folder(folder: Path, wanted: Collection[str], skip_bad: bool) -> list[str]:
    """The columns of all tables of a folder that holds nothing else: those of a split may lack what others have."""
    paths, entries = list[Path](), 0
    for place, _, files in os.walk(folder):
        entries += len(files) + 1
        if any(file.lower().endswith((*IMAGES, ".arrow")) for file in files):
            return []
        paths += [Path(place) / file for file in sorted(files) if file.lower().endswith((*FORMATS, ".gz"))]
        if len(paths) > _MOST_FILES or entries > _MOST_ENTRIES:
            return []
    seen: dict[str, None] = {}
    for path in paths:
        try:
            columns = _columns(path, wanted, skip_bad)
        except UserError:  # a file that the loader may not read at all
            return []
        if not columns:
            return []
        seen |= dict.fromkeys(columns)
    return list(seen)
