"""From the data keys to raw splits: hub ids, files, folders, and what is in memory."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from hf_transfer import hub_client
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data import bundled
from hf_transfer.data.image_paths import with_images
from hf_transfer.errors import UserError, nearest, one_line

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IN_MEMORY = "in memory"  # stands for `dataset_name` where the data came as a Python object
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
_SPLIT_NAMES = ("train", "training", "test", "testing", *_VALIDATION_NAMES)
# What a table holds for "nothing". Not pandas' own list: `NA`, `None` and `null` are words, and names of classes.
_NOTHING = ["", "nan", "NaN"]


def load_splits(args: DataArguments) -> DatasetDict:
    """The raw splits under the names train, validation and test.

    Raises:
        UserError: there is no such data, or it has no training split.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    named = _load_named(args) if args.dataset_name else DatasetDict()
    given = {
        k: _read_files({"train": matching(f, f"{k}_file")}, f"{k}_file", args)["train"] for k, f in files.items() if f
    }
    splits = DatasetDict({**{standard_name(k): v for k, v in named.items()}, **given})
    if "train" not in splits:
        raise UserError(
            f"dataset_name: {args.dataset_name!r} has no train split, only {', '.join(splits)}.",
            "Name the file to train on with --train_file.",
        )
    _check_rows(splits)
    return splits


def load_held_out(args: DataArguments, split: str | None) -> tuple[str, Dataset]:
    """(name, examples) of the split to evaluate on: the one asked for, else test, else validation, else the only one.

    Raises:
        UserError: there is no such data or split.
    """
    if args.test_file:
        files = {"test": matching(args.test_file, "test_file")}
        splits = dict(_read_files(files, "test_file", args))
    else:
        assert args.dataset_name, "checked by the caller"
        splits = {standard_name(k): v for k, v in _load_named(args).items()}
    known = f"It has {', '.join(splits)}."
    if split is not None and standard_name(split) not in splits:
        raise UserError(f"split: the data has no split {split!r}.", f"{known}{nearest(split, splits)}")
    usual = [name for name in ("test", "validation") if name in splits]
    if split is None and not usual and len(splits) > 1:
        raise UserError("split: the data has no test and no validation split.", f"{known} Name one with --split.")
    name = standard_name(split) if split is not None else next(iter(usual or splits))
    _check_rows({name: splits[name]})
    return name, splits[name]


def _check_rows(splits: Mapping[str, Dataset]) -> None:
    for name, split in splits.items():
        if len(split) == 0:
            raise UserError(f"The {name} split has no examples.", "The file is empty, or holds a header only.")


def standard_name(split: str) -> str:
    """`train`, `validation` or `test` for their other usual names."""
    return "validation" if split in _VALIDATION_NAMES else {"training": "train", "testing": "test"}.get(split, split)


def _load_named(args: DataArguments) -> DatasetDict:
    name, config_name = str(args.dataset_name), args.dataset_config_name
    if args.in_memory is not None:
        return args.in_memory
    if name == IN_MEMORY:
        raise UserError(
            "dataset_name: the run's data was a Python object, which no file holds.",
            "Give it to `fine_tune` again, or save it to a file and name that.",
        )
    if name.startswith("bundled:"):
        return bundled.load_dataset(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, args)
    if path.is_file() or is_pattern(name):
        return _read_files({"train": matching(name, "dataset_name")}, "dataset_name", args)
    if path.suffix.lower() in FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"dataset_name: there is no file or folder {name!r}.", _beside(path))
    hub_client.find("dataset_name", name, "dataset")
    try:
        return datasets.load_dataset(name, config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset_name: {name!r} cannot be loaded ({one_line(error)}).",
            "Give a hub id, a file, a folder, or bundled:<name>.",
        ) from error


def is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[") and not Path(name).expanduser().exists()


def matching(name: str, key: str) -> list[str]:
    """The files that a name or a pattern (`data/part-*.csv`, `**` for any depth) stands for.

    Raises:
        UserError: none matches, or they are of several kinds.
    """
    if not is_pattern(name):
        return [name]
    matches = glob.glob(str(Path(name).expanduser()), recursive=True)  # noqa: PTH207 - the pattern may be absolute
    found = sorted(p for p in matches if Path(p).is_file())
    if not found:
        raise UserError(f"{key}: no file matches {name!r}.", "Quote the pattern, and look at the folder it names.")
    kinds = sorted({Path(p).suffix.lower() for p in found})
    if len({FORMATS.get(kind) for kind in kinds}) > 1:
        raise UserError(f"{key}: {name!r} matches files of several kinds ({', '.join(kinds)}).", "Match one kind.")
    return found


def _load_folder(path: Path, args: DataArguments) -> DatasetDict:
    unknown = UserError(
        f"dataset_name: the folder {str(path)!r} holds no data that is known.",
        f"It may hold {', '.join(FORMATS)} files, a data set saved to disk, or images in a folder per class.",
    )
    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
        if files := split_files(path):
            return _read_files(files, "dataset_name", args)
        return datasets.load_dataset("imagefolder", data_files=split_folders(path))
    except PermissionError as error:
        raise UserError(
            f"dataset_name: the folder {str(path)!r} cannot be read ({error.strerror}).",
            "Change its permissions, or copy the data to where you may read it.",
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise unknown from error


def split_folders(folder: Path) -> dict[str, list[str]]:
    """Patterns of an image folder's files, by split: a folder per split where all names are splits' names, else one.

    `datasets` sees a split wherever a path holds its name: a class `test_tube` would become the test split.
    """
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not inside or any(p.name.lower() not in _SPLIT_NAMES for p in inside):
        inside = []
    found: dict[str, list[str]] = {}
    for place in inside:
        found.setdefault(standard_name(place.name.lower()), []).append(f"{glob.escape(str(place))}/**")
    return found or {"train": [f"{glob.escape(str(folder))}/**"]}


def split_files(folder: Path) -> dict[str, list[str]]:
    """The tables of a folder by the split that their names say; all are training data where no name says one.

    Raises:
        UserError: some names say a split and others do not.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in FORMATS and file.stem != "metadata":  # which belongs to the images beside it
            words = re.split(r"[-_. ]+", file.stem.lower())
            said = [s for s in ("train", "test", *_VALIDATION_NAMES) if s in words]
            found.setdefault(said[0] if said else "", []).append(str(file))
    if "" in found and len(found) > 1:
        raise UserError(
            f"dataset_name: in the folder {str(folder)!r} the names of some files say their split, "
            f"{Path(found[''][0]).name!r} does not.",
            "Name it train, validation or test too, or give the files with train_file, validation_file and test_file.",
        )
    return {split or "train": files for split, files in found.items()}


def _read_files(files: Mapping[str, Sequence[str]], key: str, args: DataArguments) -> DatasetDict:
    """The tables of each split; paths of images in them become images."""
    listed = {split: [Path(p).expanduser() for p in names] for split, names in files.items()}
    paths = [path for split in listed.values() for path in split]
    first = paths[0]
    kind = FORMATS.get(first.suffix.lower())
    if kind is None:
        raise UserError(f"{key}: {str(first)!r} is not a {', '.join(FORMATS)} file.")
    if not first.is_file():
        raise UserError(f"{key}: there is no file {str(first)!r}.", _beside(first))
    for path in paths:
        if path.stat().st_size == 0:
            raise UserError(f"{key}: {str(path)!r} is empty.", "Give a file with a header and at least one example.")
    read = _read_tables(kind, listed, key, args)
    if any(with_images(split, first, args) is not split for split in read.values()):  # each table's paths are its own
        tables = {
            split: [_read_tables(kind, {"one": [p]}, key, args)["one"] for p in ps] for split, ps in listed.items()
        }
        return DatasetDict(
            {
                split: datasets.concatenate_datasets(
                    [with_images(t, p, args) for t, p in zip(tables[split], ps, strict=True)]
                )
                for split, ps in listed.items()
            }
        )
    return read


def _read_tables(kind: str, listed: Mapping[str, Sequence[Path]], key: str, args: DataArguments) -> DatasetDict:
    paths = [path for split in listed.values() for path in split]
    first = paths[0]
    try:
        return datasets.load_dataset(kind, **table_options(kind, listed, args))
    except PermissionError as error:
        raise UserError(f"{key}: {str(first)!r} cannot be read ({error.strerror}).") from error
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise UserError(f"{key}: {str(first)!r} has no examples.", "It holds a header only.") from error
        name = str(first) if len(paths) == 1 else f"{first} and {len(paths) - 1} more"
        fix = (
            f"Text files are read as UTF-8. {convert(first)} `on_bad_example: skip` leaves such rows out."
            if isinstance(cause, UnicodeDecodeError)
            else f"Look at the file: is it really {kind}, and whole?"
        )
        raise UserError(f"{key}: {name!r} cannot be read as {kind} ({one_line(cause, 200)}).", fix) from error


def table_options(kind: str, listed: Mapping[str, Sequence[Path]], args: DataArguments) -> dict[str, Any]:
    """What `datasets.load_dataset` is told of tables, by split."""
    errors = "replace" if args.on_bad_example == "skip" else "strict"  # what is replaced is seen, and skipped, later
    by_kind: dict[str, dict[str, Any]] = {
        "csv": {"keep_default_na": False, "na_values": _NOTHING, "encoding_errors": errors},
        # In capitals: under "utf-8" as written in lower case, `datasets` does not look whether the bytes are.
        "json": {"encoding": "UTF-8", "encoding_errors": errors},
        "parquet": {},
    }
    is_tsv = next(path for paths in listed.values() for path in paths).suffix.lower() == ".tsv"
    data_files = {split: [glob.escape(str(path)) for path in paths] for split, paths in listed.items()}
    return {"data_files": data_files, **by_kind[kind], **({"sep": "\t"} if is_tsv else {})}


def convert(path: Path) -> str:
    """How to make UTF-8 of a text file in another encoding."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return f"`iconv -f {encoding} -t utf-8 {path.name} > utf8{path.suffix}` converts it."


def _beside(path: Path) -> str:
    """The nearest name in the same folder."""
    return nearest(path.name, [p.name for p in path.parent.iterdir()]).strip() if path.parent.is_dir() else ""
