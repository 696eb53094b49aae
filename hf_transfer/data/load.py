"""From the data keys to splits with encoded labels."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Value

from .. import hub
from ..config import DataArguments
from ..errors import UserError, nearest, one_line
from ..models import Labels
from . import bundled

LABELS = "labels"
SINGLE_LABEL = "single_label_classification"
_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Data:
    """Splits ready for a task: the input columns as they came, and `labels` encoded.

    Attributes:
        train, validation, test: the splits; `test` is None where the data has none.
        inputs: the input columns.
        labels: problem type and class names.
        notes: sentences for the user.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    inputs: tuple[str, ...]
    labels: Labels
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Dataset]:
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {k: v for k, v in named.items() if v is not None}


# ---- reading -------------------------------------------------------------------------------------------------------


def load_splits(args: DataArguments) -> DatasetDict:
    """The raw splits under the names train, validation and test.

    Raises:
        UserError: there is no such data, or it has no training split.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    named = _load_named(args.dataset_name, args.dataset_config_name) if args.dataset_name else DatasetDict()
    given = {k: _read_files({"train": f}, f"{k}_file")["train"] for k, f in files.items() if f}
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
        splits = {"test": _read_files({"train": args.test_file}, "test_file")["train"]}
    else:
        assert args.dataset_name, "checked by the caller"
        splits = {standard_name(k): v for k, v in _load_named(args.dataset_name, args.dataset_config_name).items()}
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
    return "validation" if split in _VALIDATION_NAMES else split


def _load_named(name: str, config_name: str | None) -> DatasetDict:
    if name.startswith("bundled:"):
        return bundled.load_dataset(name)
    path = Path(name).expanduser()
    if path.is_file():
        return _read_files({"train": str(path)}, "dataset_name")
    if path.is_dir():
        return _load_folder(path)
    if path.suffix.lower() in _FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"dataset_name: there is no file or folder {name!r}.", _beside(path))
    hub.find("dataset_name", name, "dataset")
    try:
        loaded = datasets.load_dataset(name, config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset_name: {name!r} cannot be loaded ({one_line(error)}).",
            "Give a hub id, a file, a folder, or bundled:<name>.",
        ) from error
    return loaded


def _load_folder(path: Path) -> DatasetDict:
    unknown = UserError(
        f"dataset_name: the folder {str(path)!r} holds no data that is known.",
        f"It may hold {', '.join(_FORMATS)} files, a data set saved to disk, or images in a folder per class.",
    )
    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
        if files := _split_files(path):
            return _read_files(files, "dataset_name")
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    except PermissionError as error:
        raise UserError(
            f"dataset_name: the folder {str(path)!r} cannot be read ({error.strerror}).",
            "Change its permissions, or copy the data to where you may read it.",
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise unknown from error


def _split_files(folder: Path) -> dict[str, list[str]]:
    """The tables of a folder by the split that their names say; all are training data where no name says one.

    Raises:
        UserError: some names say a split and others do not.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _FORMATS and file.stem != "metadata":  # which belongs to the images beside it
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


def _read_files(files: dict[str, Any], key: str) -> DatasetDict:
    listed = {split: [Path(p).expanduser() for p in ([v] if isinstance(v, str) else v)] for split, v in files.items()}
    paths = [path for split in listed.values() for path in split]
    first = paths[0]
    kind = _FORMATS.get(first.suffix.lower())
    if kind is None:
        raise UserError(f"{key}: {str(first)!r} is not a {', '.join(_FORMATS)} file.")
    if not first.is_file():
        raise UserError(f"{key}: there is no file {str(first)!r}.", _beside(first))
    for path in paths:
        if path.stat().st_size == 0:
            raise UserError(f"{key}: {str(path)!r} is empty.", "Give a file with a header and at least one example.")
    options = {"sep": "\t"} if first.suffix.lower() == ".tsv" else {}
    data_files = {split: [glob.escape(str(path)) for path in paths] for split, paths in listed.items()}
    try:
        return datasets.load_dataset(kind, data_files=data_files, **options)
    except PermissionError as error:
        raise UserError(f"{key}: {str(first)!r} cannot be read ({error.strerror}).") from error
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise UserError(f"{key}: {str(first)!r} has no examples.", "It holds a header only.") from error
        name = str(first) if len(paths) == 1 else f"{first} and {len(paths) - 1} more"
        fix = (
            f"Text files are read as UTF-8. {convert(first)}"
            if isinstance(cause, UnicodeDecodeError)
            else f"Look at the file: is it really {kind}, and whole?"
        )
        raise UserError(f"{key}: {name!r} cannot be read as {kind} ({one_line(cause, 200)}).", fix) from error


def convert(path: Path) -> str:
    """How to make UTF-8 of a text file in another encoding."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return f"`iconv -f {encoding} -t utf-8 {path.name} > utf8{path.suffix}` converts it."


def _beside(path: Path) -> str:
    """The nearest name in the same folder."""
    return nearest(path.name, [p.name for p in path.parent.iterdir()]).strip() if path.parent.is_dir() else ""


# ---- columns and labels --------------------------------------------------------------------------------------------


def label_column(features: Any, inputs: Sequence[str], args: DataArguments) -> str:
    """The label column: as given, else `label` or `labels`, else the only class column.

    Raises:
        UserError: it is not there, or several could be meant.
    """
    if args.label_column_name:
        if args.label_column_name not in features:
            raise UserError(
                f"label_column_name: there is no column {args.label_column_name!r}.",
                f"There are {', '.join(features)}.{nearest(args.label_column_name, features)}",
            )
        return args.label_column_name
    for name in ("label", LABELS):
        if name in features:
            return name
    classes = [n for n, f in features.items() if isinstance(f, ClassLabel)]
    rest = [n for n in features if n not in inputs]
    if len(classes) == 1 or len(rest) == 1:
        return (classes or rest)[0]
    if not rest:
        raise UserError(
            f"label_column_name: the data has inputs only ({', '.join(inputs)}), and no labels.",
            "A table needs a label column; an image folder needs a folder for each of two classes or more.",
        )
    raise UserError("label_column_name: the label column is not plain.", f"Name one of {', '.join(rest)}.")


def missing_labels(split: Dataset, column: str) -> list[int]:
    """Rows without a label: none, NaN, or the hub's -1 for a class that is kept secret."""
    is_class = isinstance(split.features[column], ClassLabel)
    return [
        i
        for i, v in enumerate(split[column])
        if v is None or v != v or (is_class and v == -1) or (isinstance(v, list) and None in v)
    ]


def infer_labels(train: Dataset, column: str, problem_type: str | None) -> Labels:
    """Problem type and classes of a label column, from the training split.

    Floats are a regression, lists are multi-label, everything else is one class of several.

    Raises:
        UserError: missing labels, or fewer than two classes.
    """
    feature, values = train.features[column], train[column]
    missing = missing_labels(train, column)
    if missing:
        raise UserError(
            f"{len(missing)} training examples have no label in column {column!r}, the first is row {missing[0]}.",
            "Remove them or give them one.",
        )
    inner = getattr(feature, "feature", None)
    if problem_type is None:
        is_float = isinstance(feature, Value) and feature.dtype.startswith("float")
        whole = is_float and all(float(v).is_integer() for v in values) and len(set(values)) <= 20
        problem_type = (
            "multi_label_classification"
            if inner is not None
            else "regression"
            if is_float and not whole
            else "single_label_classification"
        )
    _check_problem_type(problem_type, column, values)
    if problem_type == "multi_label_classification" and _is_many_hot(values):
        raise UserError(
            f"Column {column!r} holds a 0 or 1 for each class ({values[0]}): its classes have no names.",
            "Give the names of an example's classes instead, for example ['red', 'round'].",
        )
    if problem_type == "regression":
        return Labels(problem_type, (column,))
    source = inner if problem_type == "multi_label_classification" else feature
    if isinstance(source, ClassLabel):
        names = tuple(source.names)
    else:
        flat = {x for v in values for x in v} if problem_type == "multi_label_classification" else set(values)
        names = tuple(_name(x) for x in sorted(flat, key=lambda x: (isinstance(x, str), x)))
    if len(names) < 2:
        raise UserError(f"Column {column!r} has one class only ({', '.join(names)}): there is nothing to learn.")
    return Labels(problem_type, names)


def _is_many_hot(values: Sequence[Any]) -> bool:
    lengths = {len(v) for v in values}
    return (
        len(lengths) == 1
        and min(lengths) > 1
        and all(x in (0, 1) and not isinstance(x, str) for v in values for x in v)
    )


def _check_problem_type(problem_type: str, column: str, values: Sequence[Any]) -> None:
    """Whether the first label can be what `problem_type` says.

    Raises:
        UserError: it cannot.
    """
    fits = {
        "regression": lambda v: isinstance(v, int | float),
        "multi_label_classification": lambda v: isinstance(v, list) and not any(isinstance(x, list | dict) for x in v),
        SINGLE_LABEL: lambda v: not isinstance(v, list | dict),
    }[problem_type]
    first = next((v for v in values if not fits(v)), None)
    if first is not None:
        wanted = {
            "regression": "numbers",
            "multi_label_classification": "lists of classes",
            SINGLE_LABEL: "one class each",
        }
        raise UserError(
            f"problem_type: {problem_type} wants {wanted[problem_type]}, and column {column!r} holds {first!r}.",
            "Leave problem_type out to have it seen from the labels, or name another label_column_name.",
        )


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def encode(split: Dataset, name: str, column: str, labels: Labels) -> Dataset:
    """`split` with a column `labels`: class indices, 0/1 vectors of float, or float values.

    Raises:
        UserError: no such column, missing labels, or a label that the training split does not have.
    """
    if column not in split.features:
        raise UserError(f"The {name} split has no column {column!r}.", f"It has {', '.join(split.features)}.")
    if missing := missing_labels(split, column):
        raise UserError(f"{len(missing)} examples of the {name} split have no label, the first is row {missing[0]}.")
    ids = {n: i for i, n in enumerate(labels.names)}
    feature = split.features[column]
    source = getattr(feature, "feature", None) or feature
    as_name = source.int2str if isinstance(source, ClassLabel) else _name

    def index(value: Any) -> int:
        text = as_name(value)
        if text not in ids:
            raise UserError(
                f"The {name} split has the label {text!r}, which is none of those that the model learns.",
                f"They are {', '.join(labels.names[:10])}{' …' if len(labels.names) > 10 else ''}."
                f"{nearest(text, labels.names)}",
            )
        return ids[text]

    values = split[column]
    _check_problem_type(labels.problem_type, column, values)
    if labels.problem_type == "regression":
        encoded: list[Any] = [float(v) for v in values]
    elif labels.problem_type == "multi_label_classification":
        encoded = [
            [1.0 if i in chosen else 0.0 for i in range(len(ids))]
            for chosen in ({index(v) for v in row} for row in values)
        ]
    else:
        encoded = [index(v) for v in values]
    if LABELS in split.column_names:
        split = split.remove_columns(LABELS)
    return split.add_column(LABELS, encoded)


# ---- splits --------------------------------------------------------------------------------------------------------


def make_data(
    splits: DatasetDict, inputs: tuple[str, ...], column: str, labels: Labels, args: DataArguments, seed: int
) -> Data:
    """Encode the labels, make a validation split where there is none, and draw the numbers of examples asked for."""
    splits, notes = _without_secret_test(splits, column)
    for name, split in splits.items():
        if missing := [c for c in inputs if c not in split.features]:
            raise UserError(
                f"The {name} split has no column {missing[0]!r}, which the training split has.",
                f"It has {', '.join(split.features)}.",
            )
    encoded = {
        name: encode(splits[name], name, column, labels) for name in ("train", "validation", "test") if name in splits
    }
    if "validation" not in encoded:
        size = math.ceil(len(encoded["train"]) * args.train_val_split)
        if size >= len(encoded["train"]):
            raise UserError(
                f"The training split has {len(encoded['train'])} examples: too few to hold some out for validation.",
                "Give more examples, or a validation split of your own.",
            )
        rest, held_out, by_class = draw(encoded["train"], size, labels, seed)
        encoded |= {"train": rest, "validation": held_out}
        notes.append(
            f"No validation split: {size} of {size + len(rest)} training examples validate, drawn "
            f"{'by class' if by_class else 'at random'} "
            f"(train_val_split: {args.train_val_split:g}, seed {seed})."
        )
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for name, limit in limits.items():
        if limit is not None and name in encoded and limit < len(encoded[name]):
            encoded[name] = draw(encoded[name], limit, labels, seed)[1]
    return Data(encoded["train"], encoded["validation"], encoded.get("test"), inputs, labels, tuple(notes))


def _without_secret_test(splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """(the splits, notes) without a test split of which no example has a label, as benchmarks publish them."""
    test = splits.get("test")
    if test is None or column not in test.features or len(missing_labels(test, column)) < len(test):
        return splits, []
    rest = DatasetDict({name: split for name, split in splits.items() if name != "test"})
    return rest, ["The test split has no labels, so it is left out."]


def draw(split: Dataset, size: int, labels: Labels, seed: int) -> tuple[Dataset, Dataset, bool]:
    """(the rest, `size` examples, whether each class is there in proportion): by class where that can be done."""
    counts = Counter(split[LABELS]) if labels.problem_type == SINGLE_LABEL else Counter()
    by_class = bool(counts) and min(counts.values()) > 1 and len(counts) <= min(size, len(split) - size)
    if not by_class:
        parts = split.train_test_split(test_size=size, seed=seed)
        return parts["train"], parts["test"], False
    features = split.features.copy()
    features[LABELS] = ClassLabel(names=list(labels.names))
    parts = split.cast(features).train_test_split(test_size=size, seed=seed, stratify_by_column=LABELS)
    return parts["train"], parts["test"], True
