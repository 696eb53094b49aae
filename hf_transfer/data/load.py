"""Load raw splits from hub ids, files, folders, bundled datasets and Python objects."""

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
IN_MEMORY = "in memory"  # `dataset_name` of data that was passed as a Python object
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
_SPLIT_NAMES = ("train", "training", "test", "testing", *_VALIDATION_NAMES)
# Missing values in CSV files. Shorter than pandas' own list: `NA`, `None` and `null` may be words or class names.
_MISSING = ["", "nan", "NaN"]


def load_splits(args: DataArguments) -> DatasetDict:
    """The raw splits, named `train`, `validation` and `test`.

    Raises:
        UserError: the data does not exist, cannot be read, has an empty split, or has no training split.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    named = _load_named(args) if args.dataset_name else DatasetDict()
    given = {
        k: _read_files({"train": matching(f, f"{k}_file")}, f"{k}_file", args)["train"] for k, f in files.items() if f
    }
    splits = DatasetDict({**{standard_name(k): v for k, v in named.items()}, **given})
    if "train" not in splits:
        raise UserError(
            f"dataset_name: {args.dataset_name!r} has no train split; its splits are {', '.join(splits)}.",
            "Set --train_file to the file to train on.",
        )
    _check_rows(splits)
    return splits


def load_held_out(args: DataArguments, split: str | None) -> tuple[str, Dataset]:
    """(name, examples) of the split to evaluate on: the given one, else test, else validation, else the only one.

    Raises:
        UserError: the data or the split does not exist, or the split is empty.
    """
    if args.test_file:
        files = {"test": matching(args.test_file, "test_file")}
        splits = dict(_read_files(files, "test_file", args))
    else:
        assert args.dataset_name, "checked by the caller"
        splits = {standard_name(k): v for k, v in _load_named(args).items()}
    available = f"Its splits are {', '.join(splits)}."
    if split is not None and standard_name(split) not in splits:
        raise UserError(f"split: the data has no split {split!r}.", f"{available}{nearest(split, splits)}")
    held_out = [name for name in ("test", "validation") if name in splits]
    if split is None and not held_out and len(splits) > 1:
        raise UserError("split: the data has no test or validation split.", f"{available} Choose one with --split.")
    name = standard_name(split) if split is not None else next(iter(held_out or splits))
    _check_rows({name: splits[name]})
    return name, splits[name]


def _check_rows(splits: Mapping[str, Dataset]) -> None:
    for name, split in splits.items():
        if len(split) == 0:
            raise UserError(f"The {name} split has no examples.", "The file is empty or has only a header.")


def standard_name(split: str) -> str:
    """`train`, `validation` or `test` for their usual aliases; other names unchanged."""
    return "validation" if split in _VALIDATION_NAMES else {"training": "train", "testing": "test"}.get(split, split)


def _load_named(args: DataArguments) -> DatasetDict:
    name, config_name = str(args.dataset_name), args.dataset_config_name
    if args.in_memory is not None:
        return args.in_memory
    if name == IN_MEMORY:
        raise UserError(
            "dataset_name: the run's data was a Python object and is not stored in a file.",
            "Pass it to `fine_tune` again, or save it to a file and set dataset_name to that.",
        )
    if name.startswith("bundled:"):
        return bundled.load_dataset(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, args)
    if path.is_file() or is_pattern(name):
        return _read_files({"train": matching(name, "dataset_name")}, "dataset_name", args)
    if path.suffix.lower() in FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"dataset_name: file or folder {name!r} does not exist.", _similar_file(path))
    hub_client.find("dataset_name", name, "dataset")
    try:
        return datasets.load_dataset(name, config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset_name: {name!r} cannot be loaded ({one_line(error)}).",
            "Use a hub id, a file, a folder, or bundled:<name>.",
        ) from error


def is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[") and not Path(name).expanduser().exists()


def matching(name: str, key: str) -> list[str]:
    """The files matching a name or glob pattern (`data/part-*.csv`; `**` matches any depth).

    Raises:
        UserError: no file matches, or the files have different formats.
    """
    if not is_pattern(name):
        return [name]
    matches = glob.glob(str(Path(name).expanduser()), recursive=True)  # noqa: PTH207 - the pattern may be absolute
    files = sorted(p for p in matches if Path(p).is_file())
    if not files:
        raise UserError(f"{key}: no file matches {name!r}.", "Quote the pattern, and check that the folder exists.")
    suffixes = sorted({Path(p).suffix.lower() for p in files})
    if len({FORMATS.get(suffix) for suffix in suffixes}) > 1:
        raise UserError(
            f"{key}: {name!r} matches files of different formats ({', '.join(suffixes)}).",
            "Use a pattern that matches one format.",
        )
    return files


def _load_folder(path: Path, args: DataArguments) -> DatasetDict:
    unknown = UserError(
        f"dataset_name: unrecognized data in folder {str(path)!r}.",
        f"It should contain {', '.join(FORMATS)} files, a dataset saved with save_to_disk, or one folder of images per "
        "class.",
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
            f"dataset_name: folder {str(path)!r} cannot be read ({error.strerror}).",
            "Change its permissions, or copy the data to a folder you can read.",
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise unknown from error


def split_folders(folder: Path) -> dict[str, list[str]]:
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


def split_files(folder: Path) -> dict[str, list[str]]:
    """The tables of a folder by the split in their file names; all are training data if no name contains a split.

    Raises:
        UserError: some names contain a split and others do not.
    """
    by_split: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in FORMATS and file.stem != "metadata":  # a metadata file belongs to an image folder
            words = re.split(r"[-_. ]+", file.stem.lower())
            named = [s for s in ("train", "test", *_VALIDATION_NAMES) if s in words]
            by_split.setdefault(named[0] if named else "", []).append(str(file))
    if "" in by_split and len(by_split) > 1:
        raise UserError(
            f"dataset_name: some file names in folder {str(folder)!r} contain a split, but "
            f"{Path(by_split[''][0]).name!r} does not.",
            "Include train, validation or test in its name, or set train_file, validation_file and test_file.",
        )
    return {split or "train": files for split, files in by_split.items()}


def _read_files(files: Mapping[str, Sequence[str]], key: str, args: DataArguments) -> DatasetDict:
    """The tables of each split, with image paths turned into image columns."""
    listed = {split: [Path(p).expanduser() for p in names] for split, names in files.items()}
    paths = [path for split in listed.values() for path in split]
    first = paths[0]
    kind = FORMATS.get(first.suffix.lower())
    if kind is None:
        raise UserError(f"{key}: unsupported file format: {str(first)!r}.", f"Use one of {', '.join(FORMATS)}.")
    if not first.is_file():
        raise UserError(f"{key}: file {str(first)!r} does not exist.", _similar_file(first))
    for path in paths:
        if path.stat().st_size == 0:
            raise UserError(f"{key}: {str(path)!r} is empty.", "Use a file with a header and at least one example.")
    splits = _read_tables(kind, listed, key, args)
    # Image paths are relative to their own table's folder, so each table is read separately.
    if any(with_images(split, first, args) is not split for split in splits.values()):
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
    return splits


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
            raise UserError(f"{key}: {str(first)!r} has no examples.", "It has only a header.") from error
        name = str(first) if len(paths) == 1 else f"{first} and {len(paths) - 1} more"
        fix = (
            f"Text files are read as UTF-8. {convert(first)} `on_bad_example: skip` leaves such rows out."
            if isinstance(cause, UnicodeDecodeError)
            else f"Check that the file is {kind} and not truncated."
        )
        raise UserError(f"{key}: {name!r} cannot be read as {kind} ({one_line(cause, 200)}).", fix) from error


def table_options(kind: str, listed: Mapping[str, Sequence[Path]], args: DataArguments) -> dict[str, Any]:
    """Keyword arguments of `datasets.load_dataset` for tables of one format, by split."""
    errors = "replace" if args.on_bad_example == "skip" else "strict"  # examples with replaced bytes are skipped later
    by_kind: dict[str, dict[str, Any]] = {
        "csv": {"keep_default_na": False, "na_values": _MISSING, "encoding_errors": errors},
        # Upper case, because `datasets` does not validate the bytes under the lower-case name "utf-8".
        "json": {"encoding": "UTF-8", "encoding_errors": errors},
        "parquet": {},
    }
    is_tsv = next(path for paths in listed.values() for path in paths).suffix.lower() == ".tsv"
    data_files = {split: [glob.escape(str(path)) for path in paths] for split, paths in listed.items()}
    return {"data_files": data_files, **by_kind[kind], **({"sep": "\t"} if is_tsv else {})}


def convert(path: Path) -> str:
    """The command that converts a text file in another encoding to UTF-8, as a sentence."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return f"`iconv -f {encoding} -t utf-8 {path.name} > utf8{path.suffix}` converts it."


def _similar_file(path: Path) -> str:
    """A suggestion with the most similar name in the same folder."""
    return nearest(path.name, [p.name for p in path.parent.iterdir()]).strip() if path.parent.is_dir() else ""
