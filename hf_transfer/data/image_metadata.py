"""Metadata tables of image folders: `metadata.csv`, `.tsv`, `.jsonl` or `.parquet` with a row per image.

A table describes the images of its folder and of the folders below, except where these have a table of their own. Its
paths are relative to it. Cells of CSV and TSV files are the text that stands there; an empty one is missing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.image_layout import Split
from hf_transfer.data.image_paths import IMAGE_COLUMNS
from hf_transfer.data.image_tree import IMAGE, Folder
from hf_transfer.data.rows import BadRow, read_rows
from hf_transfer.data.split_names import SPLITS, split_roles
from hf_transfer.errors import UserError

_PATH_COLUMNS = ("file_name", *(name for name in IMAGE_COLUMNS if name != "file_name"))
_LABEL_COLUMNS = ("label", "labels")


@dataclass
class Metadata:
    """A metadata table.

    Attributes:
        path: its path.
        columns: names of its columns, without the one of the images' paths.
        rows: cells by absolute path of the image, in the order of the table.
        is_text: whether its cells are text because the file knows no types.
    """

    path: str
    columns: list[str]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_text: bool = False

    def label_columns(self, args: DataArguments) -> list[str]:
        """The columns that hold the labels: those of `label_column_name`, else `label` or `labels`; may be empty."""
        given = args.label_column_name
        if given:
            names = [given] if isinstance(given, str) else list(given)
            return names if all(name in self.columns for name in names) else []
        return next(([name] for name in _LABEL_COLUMNS if name in self.columns), [])


def find_metadata(root: Folder) -> dict[str, Metadata]:
    """Path of each folder that a table describes → that table.

    Raises:
        UserError: a folder has several tables, or a table cannot be read.
    """
    found: dict[str, Metadata] = {}
    _find(root, None, found)
    return found


def _find(folder: Folder, outer: Metadata | None, found: dict[str, Metadata]) -> None:
    if len(folder.tables) > 1:
        raise _error(f"folder {folder.path!r} has several metadata tables ({', '.join(folder.tables)}).", "Keep one.")
    table = read_metadata(Path(folder.path) / folder.tables[0]) if folder.tables else outer
    if table is not None:
        found[folder.path] = table
    for inner in folder.folders:
        _find(inner, table, found)


def read_metadata(path: Path) -> Metadata:
    """A metadata table.

    Raises:
        UserError: it cannot be read, has no column of paths, or lists an image twice.
    """
    try:
        rows = list(_rows(path))
    except UserError as error:
        raise (error if error.key else error.with_key("dataset_name")) from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    paths = next((name for name in _PATH_COLUMNS if name in names), None)
    if paths is None:
        raise _error(
            f"{str(path)!r} has no column file_name with the paths of the images. Its columns: {', '.join(names)}.",
            "Name the column file_name.",
        )
    table = Metadata(str(path), [name for name in names if name != paths], is_text=path.suffix in (".csv", ".tsv"))
    for number, row in enumerate(rows, 1):
        name = row.get(paths)
        if not isinstance(name, str) or not name.strip():
            raise _error(f"row {number} of {str(path)!r} has no {paths}.", "Add the path of its image.")
        image = _resolve(path.parent, name)
        if image in table.rows:
            raise _error(f"{str(path)!r} lists {name!r} twice.", "Keep one row per image.")
        table.rows[image] = row
    return table


def _resolve(folder: Path, name: str) -> str:
    """The absolute path of a listed image; a path written on Windows is read as one."""
    relative = os.path.normpath(name)
    path = str(folder / relative) if not relative.startswith("..") else os.path.normpath(folder / relative)
    if "\\" in name and not Path(path).is_file():
        return _resolve(folder, name.replace("\\", "/"))
    return path


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Raises:
    UserError: the table cannot be read, or a row does not fit.
    """
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise _error(f"{path.parent!s}: {row.place}: {row.reason}.", "Correct the row.")
        yield row


class Described:
    """A split with the rows that metadata tables have for its images.

    Attributes:
        split: its images.
        rows: row of each image; None if no table lists it.
        tables: tables that describe any of its images.
        left_out: number of images that are left out, by reason.
    """

    def __init__(self, split: Split, tables: Mapping[str, Metadata]):
        by_folder = {place: tables.get(place) for place in {_folder_of(path) for path in split.paths}}
        self.split = split
        self.tables = list({table.path: table for table in by_folder.values() if table is not None}.values())
        self.rows: list[dict[str, Any] | None] = []
        self.left_out = Counter[str]()
        for path in split.paths:
            table = by_folder[_folder_of(path)]
            self.rows.append(None if table is None else table.rows.get(path))

    def label_columns(self, args: DataArguments) -> list[str]:
        """The columns of the tables that hold the labels; may be empty."""
        return next((names for table in self.tables if (names := table.label_columns(args))), [])

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for table in self.tables for name in table.columns))

    def keep(self, positions: Sequence[int], reason: str) -> None:
        """Leave out all other images."""
        self.left_out[reason] += len(self.rows) - len(positions)
        self.split.paths = [self.split.paths[i] for i in positions]
        self.split.classes = [self.split.classes[i] for i in positions]
        self.rows = [self.rows[i] for i in positions]


def split_by_column(split: Split, tables: Mapping[str, Metadata], notes: list[str]) -> list[Split]:
    """Several splits in place of one, if its tables have a column `split` with names of splits.

    Raises:
        UserError: images have no row, or no name of a split in theirs, while others have.
    """
    rows = Described(split, tables).rows
    values = [None if row is None else row.get("split") for row in rows]
    roles = split_roles(sorted({value for value in values if isinstance(value, str)}))
    if not roles:
        return [split]
    for name, role in roles.items():
        if (twin := next(other for other, its in roles.items() if its == role)) != name:
            raise _error(
                f"in column split of the metadata, {twin!r} and {name!r} both mean the {role} split.",
                "Write one of them everywhere.",
            )
    if odd := [path for path, value in zip(split.paths, values, strict=True) if value not in roles]:
        raise _error(
            f"the metadata has a column split, but {len(odd):,} of {len(rows):,} images have no train, validation or "
            f"test in it (such as {odd[0]!r}).",
            "Complete the column, or rename it if it does not name splits.",
        )
    made = []
    for name in (name for name in SPLITS if name in roles.values()):
        own = [i for i, value in enumerate(values) if roles[str(value)] == name]
        paths, classes = [split.paths[i] for i in own], [split.classes[i] for i in own]
        made.append(Split(name, Counter({IMAGE: len(own)}), paths, classes, split.problem))
    for table in {id(table): table for table in tables.values()}.values():
        table.columns = [column for column in table.columns if column != "split"]
    notes.append("The splits are those of column split of the metadata.")
    return made


def _folder_of(path: str) -> str:
    return path.rpartition(os.sep)[0]


def _error(message: str, fix: str = "") -> UserError:
    return UserError(message, fix, key="dataset_name")
