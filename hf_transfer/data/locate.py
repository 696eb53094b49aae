"""Find out where a run's data is, without reading it: one decision for loading and for streaming."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError

from hf_transfer import hub_client
from hf_transfer.config.arguments.adaptation import IN_MEMORY
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.places import FORMATS, check_data, check_file, data_hint, format_of
from hf_transfer.data.image_paths import IMAGE_SUFFIXES
from hf_transfer.data.image_tree import is_hidden, walk
from hf_transfer.data.rows import remedy
from hf_transfer.data.run_outputs import is_run_file, is_run_folder
from hf_transfer.data.split_names import split_roles, split_words
from hf_transfer.errors import UserError, listed


def in_words(name: object) -> str:
    """The name of a dataset in a sentence."""
    return "data in memory" if name == IN_MEMORY else str(name)


_FILE_KEYS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


class Kind(Enum):
    """What `dataset_name` refers to."""

    NOTHING = auto()  # only files by split are given
    IN_MEMORY = auto()
    BUNDLED = auto()
    SAVED = auto()  # by `save_to_disk`
    TABLES = auto()
    IMAGE_FOLDER = auto()
    HUB = auto()


@dataclass(frozen=True)
class Tables:
    """Tables, those of a split in one format.

    Attributes:
        key: the key that names them, for messages.
        paths: files by split.
        notes: messages for the user.
    """

    key: str
    paths: Mapping[str, Sequence[Path]]
    notes: tuple[str, ...] = ()

    def format_of(self, split: str) -> str | None:
        """`csv`, `json` or `parquet`."""
        return format_of(self.paths[split][0])


@dataclass(frozen=True)
class Source:
    """Where the data is.

    Attributes:
        kind: what `dataset_name` refers to.
        name: `dataset_name`: a path, a hub id or a bundled name.
        tables: the tables of `Kind.TABLES`.
        files: the tables of `train_file`, `validation_file` and `test_file` by split; they replace splits of
            `dataset_name`.
        folders: image folders under these three keys, by split; they replace splits as `files` do.
        origin: license and language that the repository of `Kind.HUB` states.
    """

    kind: Kind
    name: str = ""
    tables: Tables | None = None
    files: Mapping[str, Tables] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()


def locate(args: DataArguments) -> Source:
    """Where the data is that the keys name.

    Raises:
        UserError: a file, folder or repository does not exist, or a file has an unsupported format.
        WorkFailed: the hub cannot be reached.
    """
    for key in ("dataset_name", *_FILE_KEYS.values()):
        if str(getattr(args, key) or "").startswith(("http://", "https://", "s3://", "gs://", "hf://")):
            raise UserError(
                f"{getattr(args, key)!r} is an address, and data is read from files, folders and the hub.",
                "Download it first (`curl -LO ADDRESS`), or give the hub id alone.",
                key=key,
            )
    for key in ("dataset_name", *_FILE_KEYS.values()):
        if getattr(args, key) == IN_MEMORY and args.in_memory is None:
            raise UserError(
                "the run's data was a Python object and is not stored in a file.",
                f"Pass it to `fine_tune` again, or save it to a file and set {key} to that.",
                key=key,
            )
    named = _locate_named(args)
    paths = {split: getattr(args, key) for split, key in _FILE_KEYS.items()}
    given = {split: str(path) for split, path in paths.items() if path and path != IN_MEMORY}
    read = {split: _files_of(split, name) for split, name in given.items()}
    return replace(
        named,
        files={
            split: replace(_tables({split: found}, _FILE_KEYS[split]), notes=notes)
            for split, (found, notes) in read.items()
            if found
        },
        folders={split: Path(given[split]).expanduser() for split, (found, _) in read.items() if not found},
    )


def _files_of(split: str, name: str) -> tuple[list[str], tuple[str, ...]]:
    """(the tables that the key of a split names: a file, a pattern, or those of a folder; notes). No tables in an image
    folder.

    Raises:
        UserError: a folder holds tables of other splits too.
    """
    key, folder = _FILE_KEYS[split], Path(name).expanduser()
    if not folder.is_dir():
        return _matching(name, key), ()
    with folder_errors(folder, key):
        found, notes = _split_files(folder)
    others = {standard for standard in found if standard not in ("train", split)}
    if others or (split != "train" and {"train", split} <= set(found)):
        raise UserError(
            f"folder {name!r} holds tables of several splits ({', '.join(sorted(found))}).",
            f"Set dataset_name: {name} for all of them, or name one file here.",
            key=key,
        )
    return [file for files in found.values() for file in files], tuple(notes)


@contextlib.contextmanager
def folder_errors(folder: Path, key: str = "dataset_name") -> Iterator[None]:
    """Context in which errors of reading a folder become `UserError`s about it."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(
            f"folder {str(folder)!r} cannot be read ({error.strerror}).",
            "Change its permissions, or copy the data to a folder you can read.",
            key=key,
        ) from error
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"unrecognized data in folder {str(folder)!r}.",
            f"It should contain {', '.join(FORMATS)} files, a dataset saved with save_to_disk, or one folder of images "
            "per class.",
            key=key,
        ) from error


def _locate_named(args: DataArguments) -> Source:
    """Where the data of `dataset_name` is."""
    if not args.dataset_name:
        return Source(Kind.NOTHING)
    name = str(args.dataset_name)
    if name == IN_MEMORY:
        return Source(Kind.IN_MEMORY, name)
    if name.startswith("bundled:"):
        return Source(Kind.BUNDLED, name)
    path = Path(name).expanduser()
    if path.is_dir():
        with folder_errors(path):
            return _locate_in_folder(path, name)
    if path.is_file():
        return Source(Kind.TABLES, name, _tables({"train": [name]}, "dataset_name"))
    if _is_pattern(name):
        matching = [Path(file) for file in _matching(name, "dataset_name")]
        root = Path(os.path.commonpath([file.parent for file in matching]))
        return Source(Kind.TABLES, name, _tables(_by_split(matching, root), "dataset_name"))
    check_data(name)
    try:
        return Source(Kind.HUB, name, origin=hub_client.find("dataset_name", name, "dataset").origin)
    except UserError as error:
        if hint := data_hint(name):
            raise type(error)(error.problem, hint, error.key) from error
        raise


def _locate_in_folder(folder: Path, name: str) -> Source:
    if any((folder / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        return Source(Kind.SAVED, name)
    files, notes = _split_files(folder)
    if files:
        tables = replace(_tables(files, "dataset_name"), notes=tuple(notes))
        _check_no_classes(folder, tables)
        return Source(Kind.TABLES, name, tables)
    return Source(Kind.IMAGE_FOLDER, name)


def _check_no_classes(folder: Path, tables: Tables) -> None:
    """Raises:
    UserError: the tables name no images, and there are folders of images next to them.
    """
    every = [path for paths in tables.paths.values() for path in paths]
    first = every[0]
    if any(map(_names_images, every)):
        return
    inside = walk(folder).with_images
    roles = split_roles(f.name for f in inside)
    classes = [f for f in inside if f.name not in roles] or [f for top in inside for f in top.with_images]
    if len(classes) > 1:
        names = ", ".join(f.name for f in classes[:3])
        raise UserError(
            f"folder {str(folder)!r} contains folders of images ({names}) and a table ({first.name}).",
            f"To train on the table, set dataset_name to {str(first)!r}; to train on the images, move the table "
            "elsewhere.",
            key="dataset_name",
        )


def _names_images(table: Path) -> bool:
    """Whether file names of images occur at the beginning of a table; a Parquet file may hold images."""
    with table.open("rb") as file:
        beginning = file.read(1 << 16).lower()
    return (
        beginning[:2] == b"\x1f\x8b" or beginning[:4] == b"par1" or any(s.encode() in beginning for s in IMAGE_SUFFIXES)
    )


def _split_files(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """(the tables of a folder by split, notes about what else is in it).

    Raises:
        UserError: see `_by_split`.
    """
    inside = sorted(path for path in folder.iterdir() if not is_hidden(path.name) and not is_run_file(path))
    # A metadata file belongs to an image folder.
    tables = [path for path in inside if format_of(path) and not path.is_dir() and path.stem != "metadata"]
    others = [f"{path.name}{'/' * path.is_dir()}" for path in inside if path not in tables and not is_run_folder(path)]
    return _by_split(tables, folder), [f"Not read in {folder.name!r}: {listed(others)}."] if others else []


def _by_split(files: Sequence[Path], root: Path) -> dict[str, list[str]]:
    """The tables below a folder by the split in their names, else in those of their folders; all are training data if
    no name contains a split.

    Raises:
        UserError: a name contains several splits, some names contain one and others do not, two names for a split are
            used, or two files seem to be the same data.
    """
    by_split: dict[str, list[str]] = {}
    used: dict[str, tuple[frozenset[str], Path]] = {}
    for file in files:
        relative = file.relative_to(root)
        words = split_words(str(relative)[: -len(relative.name)] + _base(file))
        splits = sorted(set(words.values()))
        if len(splits) > 1:
            raise _unclear(f"the name {str(relative)!r} contains several splits ({', '.join(splits)}).")
        split = splits[0] if splits else ""
        by_split.setdefault(split, []).append(str(file))
        known, first = used.setdefault(split, (frozenset(words), relative))
        if known != frozenset(words):
            raise _unclear(f"{str(first)!r} and {str(relative)!r} both mean the {split} split.")
    if "" in by_split and len(by_split) > 1:
        raise _unclear(f"some file names in folder {str(root)!r} contain a split, but {Path(by_split[''][0]).name!r} "
                       "does not.")  # fmt: skip
    seen: dict[Path, Path] = {}
    for file in files:
        if (twin := seen.setdefault(file.with_name(_base(file)), file)) is not file:
            raise _unclear(f"{twin.name!r} and {file.name!r} seem to be the same data in two formats.")
    return {split or "train": members for split, members in by_split.items()}


def _base(file: Path) -> str:
    """The name of a table without its suffixes."""
    return file.name.removesuffix(file.suffix).removesuffix(file.suffixes[-2] if file.suffix == ".gz" else "")


def _unclear(problem: str) -> UserError:
    return UserError(
        problem,
        "Include one of train, validation and test in every name, move other files elsewhere, or set train_file, "
        "validation_file and test_file.",
        key="dataset_name",
    )


def _tables(files: Mapping[str, Sequence[str]], key: str) -> Tables:
    """Raises:
    UserError: a file does not exist or is no table, or the files of a split have different formats.
    """
    paths = {split: [Path(name).expanduser() for name in names] for split, names in files.items()}
    for path in (path for split in paths.values() for path in split):
        if format_of(path) is None:
            raise UserError(f"unsupported file format: {str(path)!r}.", remedy(path), key=key)
        check_file(path, key)
    for split, members in paths.items():
        if len(formats := {format_of(path) for path in members}) > 1:
            raise UserError(
                f"the files of the {split} split have different formats ({', '.join(sorted(map(str, formats)))}).",
                "Use files of one format.",
                key=key,
            )
    return Tables(key, paths)


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[") and not Path(name).expanduser().exists()


def _matching(name: str, key: str) -> list[str]:
    """The files matching a name or glob pattern (`data/part-*.csv`; `**` matches any depth).

    Raises:
        UserError: no file matches, or the files have different formats.
    """
    if not _is_pattern(name):
        return [name]
    matches = glob.glob(str(Path(name).expanduser()), recursive=True)  # noqa: PTH207 - the pattern may be absolute
    files = sorted(p for p in matches if Path(p).is_file() and not is_run_file(Path(p)))
    if not files:
        raise UserError(f"no file matches {name!r}.", "Quote the pattern, and check that the folder exists.", key=key)
    if len({format_of(Path(p)) for p in files}) > 1:
        suffixes = sorted({Path(p).suffix.lower() for p in files})
        raise UserError(
            f"{name!r} matches files of different formats ({', '.join(suffixes)}).",
            "Use a pattern that matches one format.",
            key=key,
        )
    return files
