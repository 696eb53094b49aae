"""Find out where a run's data is, without reading it: one decision for loading and for streaming."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError

from hf_transfer import hub_client
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.run_outputs import is_run_file
from hf_transfer.errors import UserError, nearest

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IN_MEMORY = "in memory"  # `dataset_name` of data that was passed as a Python object
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
_SPLIT_NAMES = ("train", "training", "test", "testing", *_VALIDATION_NAMES)
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
    """Tables of one format.

    Attributes:
        key: the key that names them, for messages.
        format: name of their loader in `datasets`.
        paths: files by split.
    """

    key: str
    format: str
    paths: Mapping[str, Sequence[Path]]

    @property
    def first(self) -> Path:
        return next(path for paths in self.paths.values() for path in paths)


@dataclass(frozen=True)
class Source:
    """Where the data is.

    Attributes:
        kind: what `dataset_name` refers to.
        name: `dataset_name`: a path, a hub id or a bundled name.
        tables: the tables of `Kind.TABLES`.
        patterns: file patterns by split of `Kind.IMAGE_FOLDER`.
        files: the tables of `train_file`, `validation_file` and `test_file` by split; they replace splits of
            `dataset_name`.
        origin: license and language that the repository of `Kind.HUB` states.
    """

    kind: Kind
    name: str = ""
    tables: Tables | None = None
    patterns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: Mapping[str, Tables] = field(default_factory=dict)
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
    named = _locate_named(args)
    given = {split: getattr(args, key) for split, key in _FILE_KEYS.items() if getattr(args, key)}
    files = {
        split: _tables({split: _matching(file, _FILE_KEYS[split])}, _FILE_KEYS[split]) for split, file in given.items()
    }
    return replace(named, files=files)


def standard_name(split: str) -> str:
    """`train`, `validation` or `test` for their usual aliases; other names unchanged."""
    return "validation" if split in _VALIDATION_NAMES else {"training": "train", "testing": "test"}.get(split, split)


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Context in which errors of reading a folder become `UserError`s about it."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(
            f"folder {str(folder)!r} cannot be read ({error.strerror}).",
            "Change its permissions, or copy the data to a folder you can read.",
            key="dataset_name",
        ) from error
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"unrecognized data in folder {str(folder)!r}.",
            f"It should contain {', '.join(FORMATS)} files, a dataset saved with save_to_disk, or one folder of images "
            "per class.",
            key="dataset_name",
        ) from error


def _locate_named(args: DataArguments) -> Source:
    """Where the data of `dataset_name` is."""
    if not args.dataset_name:
        return Source(Kind.NOTHING)
    name = str(args.dataset_name)
    if args.in_memory is not None:
        return Source(Kind.IN_MEMORY, name)
    if name == IN_MEMORY:
        raise UserError(
            "the run's data was a Python object and is not stored in a file.",
            "Pass it to `fine_tune` again, or save it to a file and set dataset_name to that.",
            key="dataset_name",
        )
    if name.startswith("bundled:"):
        return Source(Kind.BUNDLED, name)
    path = Path(name).expanduser()
    if path.is_dir():
        with folder_errors(path):
            return _locate_in_folder(path, name)
    if path.is_file() or _is_pattern(name):
        return Source(Kind.TABLES, name, _tables({"train": _matching(name, "dataset_name")}, "dataset_name"))
    if path.suffix.lower() in FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"file or folder {name!r} does not exist.", _similar_file(path), key="dataset_name")
    return Source(Kind.HUB, name, origin=hub_client.find("dataset_name", name, "dataset").origin)


def _locate_in_folder(folder: Path, name: str) -> Source:
    if any((folder / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        return Source(Kind.SAVED, name)
    if files := _split_files(folder):
        return Source(Kind.TABLES, name, _tables(files, "dataset_name"))
    return Source(Kind.IMAGE_FOLDER, name, patterns=_split_folders(folder))


def _split_folders(folder: Path) -> dict[str, list[str]]:
    """File patterns of an image folder by split: its subfolders if all of them are named after splits, else one split.

    `datasets` itself infers a split wherever its name occurs in a path: a class `test_tube` would become the test
    split.
    """
    subfolders = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if any(p.name.lower() not in _SPLIT_NAMES for p in subfolders):
        subfolders = []
    patterns: dict[str, list[str]] = {}
    for subfolder in subfolders:
        patterns.setdefault(standard_name(subfolder.name.lower()), []).append(f"{glob.escape(str(subfolder))}/**")
    return patterns or {"train": [f"{glob.escape(str(folder))}/**"]}


def _split_files(folder: Path) -> dict[str, list[str]]:
    """The tables of a folder by the split in their file names; all are training data if no name contains a split.

    Raises:
        UserError: some names contain a split and others do not.
    """
    by_split: dict[str, list[str]] = {}
    for file in sorted(file for file in folder.iterdir() if not is_run_file(file)):
        if file.suffix.lower() in FORMATS and file.stem != "metadata":  # a metadata file belongs to an image folder
            words = re.split(r"[-_. ]+", file.stem.lower())
            named = [s for s in ("train", "test", *_VALIDATION_NAMES) if s in words]
            by_split.setdefault(named[0] if named else "", []).append(str(file))
    if "" in by_split and len(by_split) > 1:
        raise UserError(
            f"some file names in folder {str(folder)!r} contain a split, but {Path(by_split[''][0]).name!r} does not.",
            "Include train, validation or test in its name, or set train_file, validation_file and test_file.",
            key="dataset_name",
        )
    return {split or "train": files for split, files in by_split.items()}


def _tables(files: Mapping[str, Sequence[str]], key: str) -> Tables:
    """Raises:
    UserError: a file does not exist, or the first one has an unsupported format.
    """
    paths = {split: [Path(name).expanduser() for name in names] for split, names in files.items()}
    every = [path for split in paths.values() for path in split]
    table_format = FORMATS.get(every[0].suffix.lower())
    if table_format is None:
        raise UserError(f"unsupported file format: {str(every[0])!r}.", f"Use one of {', '.join(FORMATS)}.", key=key)
    if missing := [path for path in every if not path.is_file()]:
        raise UserError(f"file {str(missing[0])!r} does not exist.", _similar_file(missing[0]), key=key)
    return Tables(key, table_format, paths)


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
    suffixes = sorted({Path(p).suffix.lower() for p in files})
    if len({FORMATS.get(suffix) for suffix in suffixes}) > 1:
        raise UserError(
            f"{name!r} matches files of different formats ({', '.join(suffixes)}).",
            "Use a pattern that matches one format.",
            key=key,
        )
    return files


def _similar_file(path: Path) -> str:
    """A suggestion with the most similar name in the same folder."""
    return nearest(path.name, [p.name for p in path.parent.iterdir()]).strip() if path.parent.is_dir() else ""
