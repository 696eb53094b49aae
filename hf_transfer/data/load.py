"""Load raw splits from hub ids, files, folders, bundled datasets and Python objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Value

from hf_transfer import hub_client
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.places import data_hint
from hf_transfer.data import bundled
from hf_transfer.data.image_folders import read_image_folder
from hf_transfer.data.image_paths import with_images
from hf_transfer.data.locate import Kind, Source, Tables, folder_errors, locate
from hf_transfer.data.raw import BadExample, RawSplits, replaced
from hf_transfer.data.split_names import standard_name
from hf_transfer.data.tables import read_files
from hf_transfer.errors import UserError, listed, nearest, one_line, option

_USED = ("train", "validation", "test")


def load_splits(args: DataArguments, source: Source | None = None) -> RawSplits:
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
            f"Set {option('train_file')} to the file to train on.",
        )
    _check_rows(splits)
    if unused := [f"{name} ({len(split):,} examples)" for name, split in splits.items() if name not in _USED]:
        splits.notes.append(f"Not used: split {', '.join(unused)}.")
    return splits.but({name: split for name, split in splits.items() if name in _USED})


def load_unlabeled(args: DataArguments, classes: Collection[str] = ()) -> RawSplits:
    """The training split of the data that `dataset_name` says, alone; an image folder need not have class folders.

    Args:
        args: data keys.
        classes: names of class folders whose images get a label, in a column `target_label_column_name`.

    Raises:
        UserError: the data does not exist, cannot be read, is empty, or has no training split.
    """
    source = locate(args)
    if source.kind is not Kind.IMAGE_FOLDER:
        splits = load_splits(args, source)
    else:
        splits = _unlabeled_folder(source, args, classes)
        if "train" not in splits:
            raise UserError(f"{args.dataset_name!r} has no train split; its splits are {', '.join(splits)}.")
        _check_rows(splits)
    return splits.but({"train": splits["train"]})


def _unlabeled_folder(source: Source, args: DataArguments, classes: Collection[str] = ()) -> RawSplits:
    with folder_errors(source.path):
        splits = read_image_folder(source.path, args, False, classes)
    return splits.but({standard_name(name): split for name, split in splits.items()})


def load_held_out(args: DataArguments, split: str | None, is_labeled: bool = True) -> tuple[str, RawSplits]:
    """(name, that split alone) of the split to evaluate on: the given one, else test, else validation, else the only.

    Args:
        args: data keys.
        split: its name.
        is_labeled: whether labels are wanted; if not, an image folder need not have class folders.

    Raises:
        UserError: the data or the split does not exist, or the split is empty.
    """
    assert args.test_file or args.dataset_name, "checked by the caller"
    name = None if args.test_file else args.dataset_name
    source = locate(replace(args, dataset_name=name, train_file=None, validation_file=None))
    has_classes = is_labeled or source.kind is not Kind.IMAGE_FOLDER
    splits = _read(source, args) if has_classes else _unlabeled_folder(source, args)
    available = f"Its splits are {', '.join(splits)}."
    if split is not None and standard_name(split) not in splits:
        raise UserError(f"split: the data has no split {split!r}.", f"{available}{nearest(split, splits)}")
    held_out = [name for name in ("test", "validation") if name in splits]
    if split is None and not held_out and len(splits) > 1:
        raise UserError(
            "split: the data has no test or validation split.", f"{available} Choose one with {option('split')}."
        )
    chosen = standard_name(split) if split is not None else next(iter(held_out or splits))
    _check_rows({chosen: splits[chosen]})
    return chosen, splits.but({chosen: splits[chosen]})


def _check_rows(splits: Mapping[str, Dataset]) -> None:
    for name, split in splits.items():
        if len(split) == 0:
            raise UserError(f"The {name} split has no examples.", "The file is empty or has only a header.")


def _read(source: Source, args: DataArguments) -> RawSplits:
    """All splits of the data under their standard names.

    Raises:
        UserError: they cannot be read, or two of them have names for the same split.
    """
    named = RawSplits.of(_read_named(source, args))
    splits: dict[str, Dataset] = {}
    given: dict[str, str] = {}
    for name, split in named.items():
        standard = standard_name(name)
        if standard in splits:
            raise UserError(
                f"splits {given[standard]!r} and {name!r} both mean the {standard} split.",
                "Rename one of them, or name the files with train_file, validation_file and test_file.",
                key="dataset_name",
            )
        splits[standard], given[standard] = split, name
    read = named.but(splits)
    for split_name, tables in source.files.items():
        one = _read_files(tables, args)
        read[split_name] = one[split_name]
        read.notes += one.notes
        read.bad += one.bad
        read.files |= one.files
        read.written = one.written if split_name == "train" else read.written or one.written
    for split_name, folder in source.folders.items():
        one = _read_image_folder(split_name, folder, args)
        read[split_name] = one[split_name]
        read.notes += one.notes
    if source.kind is not Kind.IN_MEMORY and args.in_memory is not None:  # `eval_dataset`, `test_dataset`
        read.update(args.in_memory)
        read.notes += RawSplits.of(args.in_memory).notes
    return read


def _read_image_folder(split: str, folder: Path, args: DataArguments) -> RawSplits:
    """The one split of an image folder, with its classes as names: other folders may have other classes.

    Raises:
        UserError: the folder holds several splits.
    """
    with folder_errors(folder, f"{split}_file"):
        raw = read_image_folder(folder, args)
    if len(raw) != 1:
        raise UserError(
            f"folder {str(folder)!r} holds several splits ({', '.join(raw)}).",
            f"Set dataset_name: {folder} for all of them.",
            key=f"{split}_file",
        )
    (images,) = raw.values()
    for column, feature in images.features.items():
        if isinstance(feature, ClassLabel):
            names = [None if i is None or i < 0 else feature.names[i] for i in images[column][:]]
            images = replaced(images, column, names, Value("string"))
    return RawSplits({split: images}, [note.replace("train:", f"{split}:", 1) for note in raw.notes])


def _read_named(source: Source, args: DataArguments) -> Mapping[str, Dataset]:
    """The splits of `dataset_name`."""
    if source.kind is Kind.NOTHING:
        return RawSplits({})
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
            f"{hub_client.off('datasets')}{data_hint(name) or 'Use a hub id, a file, a folder, or bundled:<name>.'}",
        ) from error


def _read_files(tables: Tables, args: DataArguments) -> RawSplits:
    """The tables of each split, with image paths turned into image columns."""
    read = RawSplits({}, tables.notes)
    for split, paths in tables.paths.items():
        try:
            files = read_files(paths, args.on_bad_example == "skip")
        except UserError as error:
            raise (error if error.key else error.with_key(tables.key)) from error
        parts = [with_images(file.table, file.path, args) for file in files]
        read[split] = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        read.files[split] = [(file.path, len(file.table)) for file in files]
        if len(files) > 1:
            read.notes.append(f"The {split} split has {len(files)} files: {listed(f.path.name for f in files)}.")
        read.notes += [note for file in files for note in file.notes]
        read.bad += [BadExample(split, bad.place, bad.reason) for file in files for bad in file.bad]
        if tables.format_of(split) == "csv" and (split == "train" or not read.written):
            read.written = frozenset(files[0].table.column_names)
    return read
