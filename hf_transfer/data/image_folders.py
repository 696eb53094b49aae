"""Read a folder of images: splits and classes from the names of folders, labels and columns from metadata tables.

Every file below the folder is found and read, or left out with a reason that the notes give. No image is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from datasets.table import InMemoryTable

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.image_layout import Split, find_layout
from hf_transfer.data.image_metadata import Described, Metadata, find_metadata, split_by_column
from hf_transfer.data.image_paths import UNREADABLE_IMAGES
from hf_transfer.data.image_tree import IMAGE, Folder, plural, walk
from hf_transfer.data.raw import RawSplits
from hf_transfer.errors import UserError, one_line

_IMAGE, _LABEL = "image", "label"  # columns
_MAX_KINDS = 8  # kinds of files in a note
_NO_LABEL = -1  # as hub datasets mark hidden labels


def read_image_folder(
    folder: Path, args: DataArguments, is_labeled: bool = True, classes: Collection[str] = ()
) -> RawSplits:
    """The splits of an image folder: columns `image` (undecoded), `label` if folders are the classes, and metadata.

    The first two have the names that `image_column_name` and `label_column_name` give them. Class names are sorted. A
    held-out split without labels keeps its images with missing labels.

    Args:
        folder: of images.
        args: data keys.
        is_labeled: whether labels are wanted; if not, class folders are read as one, and the only column is `image`.
        classes: without wanted labels, class folders whose names are kept all the same, in the column
            `target_label_column_name`; it is missing for the images of other folders.

    Raises:
        UserError: there are no images, their folders or tables allow two readings, or they do not fit together.
        OSError: a folder cannot be read.
    """
    root = walk(folder)
    tables = find_metadata(root)
    root.take({path for table in tables.values() for path in table.rows})
    _check_has_images(root)
    layout = find_layout(root, lambda inner: inner.path in tables)
    if tables and len(layout.splits) == 1:
        layout.splits = split_by_column(layout.splits[0], tables, layout.notes)
    reader = _Reader(args, layout.notes, is_labeled, classes)
    splits: dict[str, Dataset] = {}
    for split in layout.splits:
        described = Described(split, tables)
        splits[split.name] = reader.read(described)
        layout.notes.append(_count(described, len(splits[split.name])))
    if is_labeled:
        _check_all_listed(root, layout.splits, tables, args, layout.notes)
    outside = root.tally - sum((split.tally for split in layout.splits), Counter[str]())
    if outside:
        layout.notes.append(f"In no split: {plural(outside.total(), 'file')} ({_kinds(outside)}).")
    if (given := args.image_column_name) and not any(given in split.features for split in splits.values()):
        splits = {name: split.rename_column(_IMAGE, given) for name, split in splits.items()}
    text = [name for table in tables.values() if table.is_text for name in table.columns]
    return RawSplits(splits, layout.notes, written=text)


def _check_has_images(root: Folder) -> None:
    """Raises:
    UserError: there are none that can be read.
    """
    if root.tally[IMAGE]:
        return
    if unreadable := Counter({kind: n for kind, n in root.tally.items() if kind in UNREADABLE_IMAGES}):
        raise _error(
            f"folder {root.path!r} contains only images that cannot be read ({_kinds(unreadable)}).",
            _remedies(unreadable),
        )
    raise _error(
        f"unrecognized data in folder {root.path!r}: {_kinds(root.tally) or 'it is empty'}.",
        "It should contain tables (.csv, .tsv, .json, .jsonl, .parquet), a dataset saved with save_to_disk, or one "
        "folder of images per class.",
    )


# ---- splits --------------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Turns splits into datasets, the training split (or the only one) first.

    Attributes:
        args: data keys.
        notes: messages for the user.
        is_labeled: whether labels are wanted.
        classes: see `read_image_folder`.
        first: the first split.
    """

    args: DataArguments
    notes: list[str]
    is_labeled: bool = True
    classes: Collection[str] = ()
    first: Dataset | None = field(default=None)

    def read(self, described: Described) -> Dataset:
        """The dataset of a split.

        Raises:
            UserError: the folders are not classes and no table has the labels, or images and tables do not fit.
        """
        split = described.split
        is_flat = not split.class_names
        if not split.paths:
            kinds = _kinds(split.tally)
            raise _error(f"the {split.name} split has no image that can be read ({kinds}).", _remedies(split.tally))
        if not self.is_labeled:
            made = self._unlabeled(split)
        elif label := described.label_columns(self.args):
            self._check_agreement(described, label)
            self._check_listed(described)
            made = _dataset(split.paths, described)
        elif described.tables and (is_flat or self._has_one_folder(split)):
            self._check_listed(described)  # one of the other columns holds the labels
            made = _dataset(split.paths, described)
        elif self.first is not None and is_flat:
            made = _unlabeled(split.paths, self.first)
        elif split.problem is not None:
            raise split.problem
        else:
            self._note_unlisted(described)
            made = _dataset(
                split.paths, described, split.classes, self._class_names(split), self._label_name(described)
            )
        self.first = made if self.first is None else self.first
        return made

    def _unlabeled(self, split: Split) -> Dataset:
        """The images of a split, with the names of the class folders that are kept."""
        columns: dict[str, Any] = {_IMAGE: _image_cells(split.paths)}
        if self.classes:
            kept = [name if name in self.classes else None for name in split.classes]
            columns[str(self.args.target_label_column_name)] = pa.array(kept, pa.string())
        ignored = [name for name in split.class_names if name not in self.classes]
        if self.classes and ignored:
            self.notes.append(f"folders that are none of the classes are read as unlabeled: {', '.join(ignored)}.")
        elif len(ignored) > 1:
            self.notes.append(f"the names of its {len(ignored)} folders are ignored.")
        return _of_columns(columns, {_IMAGE: Image(decode=False)})

    def _has_one_folder(self, split: Split) -> bool:
        """Whether all training images are in one folder, so that folders are not the classes."""
        if self.first is not None:
            return not any(isinstance(feature, ClassLabel) for feature in self.first.features.values())
        return len(split.class_names) == 1

    def _label_name(self, described: Described) -> str:
        """The name for the column of class folders: that of the training labels, where tables have them."""
        given = self.args.label_column_name
        names = [given] if isinstance(given, str) else ["label", "labels"]
        known = [name for name in names if self.first is not None and name in self.first.features]
        if isinstance(given, str) and not described.tables:
            return given
        return next(iter(known), _LABEL)

    def _class_names(self, split: Split) -> list[str]:
        """Those of the training split, and after them those that only this split has."""
        features = {} if self.first is None else self.first.features
        known = next((list(f.names) for f in features.values() if isinstance(f, ClassLabel)), [])
        return known + [name for name in split.class_names if name not in known]

    def _note_unlisted(self, described: Described) -> None:
        unlisted = described.rows.count(None)
        if described.tables and unlisted:
            table, columns = described.tables[0].path, ", ".join(described.columns)
            self.notes.append(
                f"{described.split.name}: no {columns} for {plural(unlisted, 'image')} that {table} does not list."
            )

    def _check_listed(self, described: Described) -> None:
        """Raises:
        UserError: images have no row, and are not left out.
        """
        split, listed = described.split, [i for i, row in enumerate(described.rows) if row is not None]
        missing = len(described.rows) - len(listed)
        names = " and ".join(table.path for table in described.tables)
        if missing and self.args.on_bad_example != "skip":
            first = next(path for path, row in zip(split.paths, described.rows, strict=True) if row is None)
            raise _error(
                f"{missing:,} of {len(described.rows):,} images of the {split.name} split have no label, because "
                f"{names} does not list them (such as {first!r}).",
                "List them, move them elsewhere, or set on_bad_example: skip to leave them out.",
            )
        described.keep(listed, "not listed in the metadata")

    def _check_agreement(self, described: Described, columns: list[str]) -> None:
        """Compare the labels of a table with the names of the folders.

        Raises:
            UserError: they are the same names, but differ for some images.
        """
        split = described.split
        if self.args.label_column_name or split.problem or len(split.class_names) < 2:
            return
        (column,) = columns
        pairs = [
            (path, str(row.get(column)), name)
            for path, row, name in zip(split.paths, described.rows, split.classes, strict=True)
            if row is not None and name is not None
        ]
        differing = [pair for pair in pairs if pair[1] != pair[2]]
        where = f"column {column!r} of {described.tables[0].path!r}"
        if differing and {label for _, label, _ in pairs} & set(split.class_names):
            path, label, name = differing[0]
            raise _error(
                f"{where} and the class folders disagree about {plural(len(differing), 'image')}: {path!r} is "
                f"{label!r} in the table and in folder {name!r}.",
                f"Correct one of them, or set label_column_name: {column} to use the table.",
            )
        if differing:
            self.notes.append(f"{split.name}: the labels are {where}, not the names of the folders.")


def _check_all_listed(
    root: Folder, splits: Sequence[Split], tables: Mapping[str, Metadata], args: DataArguments, notes: list[str]
) -> None:
    """Raises:
    UserError: tables list files that do not exist, and this is not skipped.
    """
    read = {path for split in splits for path in split.paths}
    unread = [
        path for table in {t.path: t for t in tables.values()}.values() for path in table.rows if path not in read
    ]
    missing = [path for path in unread if not Path(path).exists()]
    if missing and args.on_bad_example != "skip":
        raise _error(
            f"the metadata lists {plural(len(missing), 'image')} missing on disk (such as {missing[0]!r}).",
            "Correct the paths, which are relative to the table, or set on_bad_example: skip to leave them out.",
        )
    if missing:
        notes.append(f"The metadata lists {plural(len(missing), 'image')} missing on disk (such as {missing[0]!r}).")
    if others := len(unread) - len(missing):
        notes.append(f"The metadata lists {plural(others, 'file')} that are not read.")


# ---- datasets ------------------------------------------------------------------------------------------------------


def _dataset(
    paths: Sequence[str],
    described: Described,
    classes: Sequence[str | None] = (),
    names: Sequence[str] = (),
    label: str = _LABEL,
) -> Dataset:
    """A dataset of undecoded images, with their classes if any are given, and the columns of the tables.

    Raises:
        UserError: a column of a table has the name of one of these columns, or mixes types of values.
    """
    columns, features = {_IMAGE: _image_cells(paths)}, {_IMAGE: Image(decode=False)}
    if classes:
        ids = {name: i for i, name in enumerate(names)}
        columns[label] = pa.array([ids[name] for name in classes if name is not None], pa.int64())
        features[label] = ClassLabel(names=list(names))
    for name in described.columns:
        if name in columns:
            raise _error(f"column {name!r} of {described.tables[0].path!r} would hide the {name}s.", "Rename it.")
        try:
            values = pa.array([None if row is None else row.get(name) for row in described.rows])
        except pa.ArrowException as error:
            raise _error(f"column {name!r} of the metadata mixes types of values ({one_line(error, 150)}).") from error
        columns[name] = values.cast(pa.string()) if pa.types.is_null(values.type) else values
    return _of_columns(columns, features)


def _unlabeled(paths: Sequence[str], like: Dataset) -> Dataset:
    """Images with missing values in all other columns of the training split."""
    columns: dict[str, Any] = {_IMAGE: _image_cells(paths)}
    for name, feature in like.features.items():
        if name != _IMAGE:
            missing = _NO_LABEL if isinstance(feature, ClassLabel) else None
            columns[name] = pa.array([missing] * len(paths), like.data.schema.field(name).type)
    return _of_columns(columns, dict(like.features))


def _of_columns(columns: Mapping[str, Any], features: Mapping[str, Any]) -> Dataset:
    table = pa.table(dict(columns))
    inferred = Features.from_arrow_schema(table.schema)
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=Features({**inferred, **features})))


def _image_cells(paths: Sequence[str]) -> pa.StructArray:
    """Raises:
    UserError: a name cannot be encoded.
    """
    try:
        names = pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        bad = next(path for path in paths if any("\ud800" <= c <= "\udfff" for c in path))
        shown = bad.encode("utf-8", "backslashreplace").decode()
        raise _error(f"the name of file '{shown}' is not valid UTF-8.", "Rename it.") from error
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), names], ["bytes", "path"])


# ---- notes ---------------------------------------------------------------------------------------------------------


def _count(described: Described, read: int) -> str:
    """How many files of a split were found, read and left out."""
    tally = described.split.tally
    left_out = tally + described.left_out
    left_out[IMAGE] = 0
    note = f"{described.split.name}: {plural(tally.total(), 'file')} found, {read:,} read"
    note += f"; left out: {_kinds(left_out)}." if left_out.total() else "."
    return f"{note} {_remedies(left_out)}".strip()


def _kinds(tally: Counter[str]) -> str:
    by_number = sorted(((kind, n) for kind, n in tally.items() if n), key=lambda item: (-item[1], item[0]))
    shown = [f"{n:,} {kind}" for kind, n in by_number[:_MAX_KINDS]]
    return ", ".join([*shown, "…"] if len(by_number) > _MAX_KINDS else shown)


def _remedies(tally: Counter[str]) -> str:
    """What makes the images readable that were left out."""
    return " ".join(dict.fromkeys(UNREADABLE_IMAGES[kind] for kind in tally if kind in UNREADABLE_IMAGES))


def _error(message: str, fix: str = "") -> UserError:
    return UserError(message, fix, key="dataset_name")
