"""Load raw splits from hub ids, files, folders, bundled datasets and Python objects."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data import bundled
from hf_transfer.data.image_folders import read_image_folder
from hf_transfer.data.image_paths import with_images
from hf_transfer.data.locate import Kind, Source, Tables, folder_errors, locate
from hf_transfer.data.split_names import standard_name
from hf_transfer.errors import UserError, nearest, one_line

# Missing values in CSV files. Shorter than pandas' own list: `NA`, `None` and `null` may be words or class names.
_MISSING = ["", "nan", "NaN"]


def load_splits(args: DataArguments, source: Source | None = None) -> DatasetDict:
    """The raw splits, named `train`, `validation` and `test`.

    Args:
        args: data keys.
        source: where the data is, if that is known already.

    Raises:
        UserError: the data does not exist, cannot be read, has an empty split, or has no training split.
    """
    splits = _read(source or locate(args), args)
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
    assert args.test_file or args.dataset_name, "checked by the caller"
    name = None if args.test_file else args.dataset_name
    splits = _read(locate(replace(args, dataset_name=name, train_file=None, validation_file=None)), args)
    available = f"Its splits are {', '.join(splits)}."
    if split is not None and standard_name(split) not in splits:
        raise UserError(f"split: the data has no split {split!r}.", f"{available}{nearest(split, splits)}")
    held_out = [name for name in ("test", "validation") if name in splits]
    if split is None and not held_out and len(splits) > 1:
        raise UserError("split: the data has no test or validation split.", f"{available} Choose one with --split.")
    chosen = standard_name(split) if split is not None else next(iter(held_out or splits))
    _check_rows({chosen: splits[chosen]})
    return chosen, splits[chosen]


def _check_rows(splits: Mapping[str, Dataset]) -> None:
    for name, split in splits.items():
        if len(split) == 0:
            raise UserError(f"The {name} split has no examples.", "The file is empty or has only a header.")


def _read(source: Source, args: DataArguments) -> DatasetDict:
    """All splits of the data under their standard names."""
    named = {standard_name(name): split for name, split in _read_named(source, args).items()}
    files = {split: _read_files(tables, args)[split] for split, tables in source.files.items()}
    return DatasetDict({**named, **files})


def _read_named(source: Source, args: DataArguments) -> DatasetDict:
    """The splits of `dataset_name`."""
    if source.kind is Kind.NOTHING:
        return DatasetDict()
    if source.kind is Kind.IN_MEMORY:
        return args.in_memory
    if source.kind is Kind.BUNDLED:
        return bundled.load_dataset(source.name)
    if source.kind is Kind.HUB:
        return _read_from_hub(source.name, args.dataset_config_name)
    if source.tables is not None:
        return _read_files(source.tables, args)
    with folder_errors(source.path):
        if source.kind is Kind.SAVED:
            saved = datasets.load_from_disk(str(source.path))
            return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        return read_image_folder(source.path, args)


def _read_from_hub(name: str, config_name: str | None) -> DatasetDict:
    try:
        return datasets.load_dataset(name, config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset_name: {name!r} cannot be loaded ({one_line(error)}).",
            "Use a hub id, a file, a folder, or bundled:<name>.",
        ) from error


def _read_files(tables: Tables, args: DataArguments) -> DatasetDict:
    """The tables of each split, with image paths turned into image columns."""
    for path in (path for paths in tables.paths.values() for path in paths):
        if path.stat().st_size == 0:
            raise UserError(
                f"{str(path)!r} is empty.", "Use a file with a header and at least one example.", key=tables.key
            )
    splits = _read_tables(tables, args)
    if all(with_images(split, tables.first, args) is split for split in splits.values()):
        return splits
    # Image paths are relative to their own table's folder, so each table is read separately.
    return DatasetDict(
        {
            split: datasets.concatenate_datasets([_read_one(replace(tables, paths={split: [p]}), args) for p in paths])
            for split, paths in tables.paths.items()
        }
    )


def _read_one(table: Tables, args: DataArguments) -> Dataset:
    """A single table, with image paths turned into image columns."""
    (split,) = _read_tables(table, args).values()
    return with_images(split, table.first, args)


def _read_tables(tables: Tables, args: DataArguments) -> DatasetDict:
    first = tables.first
    try:
        return datasets.load_dataset(tables.format, **table_options(tables, args))
    except PermissionError as error:
        raise UserError(f"{str(first)!r} cannot be read ({error.strerror}).", key=tables.key) from error
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise UserError(f"{str(first)!r} has no examples.", "It has only a header.", key=tables.key) from error
        others = sum(map(len, tables.paths.values())) - 1
        name = f"{first} and {others} more" if others else str(first)
        fix = (
            f"Text files are read as UTF-8. {convert(first)} `on_bad_example: skip` leaves such rows out."
            if isinstance(cause, UnicodeDecodeError)
            else f"Check that the file is {tables.format} and not truncated."
        )
        raise UserError(
            f"{name!r} cannot be read as {tables.format} ({one_line(cause, 200)}).", fix, key=tables.key
        ) from error


def table_options(tables: Tables, args: DataArguments) -> dict[str, Any]:
    """Keyword arguments of `datasets.load_dataset` for tables."""
    errors = "replace" if args.on_bad_example == "skip" else "strict"  # examples with replaced bytes are skipped later
    by_format: dict[str, dict[str, Any]] = {
        "csv": {"keep_default_na": False, "na_values": _MISSING, "encoding_errors": errors},
        # Upper case, because `datasets` does not validate the bytes under the lower-case name "utf-8".
        "json": {"encoding": "UTF-8", "encoding_errors": errors},
        "parquet": {},
    }
    is_tsv = tables.first.suffix.lower() == ".tsv"
    data_files = {split: [glob.escape(str(path)) for path in paths] for split, paths in tables.paths.items()}
    return {"data_files": data_files, **by_format[tables.format], **({"sep": "\t"} if is_tsv else {})}


def convert(path: Path) -> str:
    """The command that converts a text file in another encoding to UTF-8, as a sentence."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return f"`iconv -f {encoding} -t utf-8 {path.name} > utf8{path.suffix}` converts it."
