"""The labels of a dataset: find their column, infer problem type and classes, encode them as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Value
from transformers import PreTrainedConfig

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.errors import UserError, nearest

LABELS = "labels"
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
NO_LABEL = "missing label"
_MAX_SHOWN = 10
_WHOLE_NUMBER_CLASSES = 20  # a float column with only whole numbers and at most this many distinct values is classes


# ---- columns -------------------------------------------------------------------------------------------------------


def find_labels(splits: Mapping[str, Dataset], inputs: Sequence[str], args: DataArguments) -> tuple[DatasetDict, str]:
    """(splits with their labels in one column, the name of that column).

    Several 0/1 columns, or one column of delimited names, become one column of lists of names.

    Raises:
        UserError: the column does not exist, is ambiguous, or holds invalid values.
    """
    first = next(iter(splits.values()))
    columns = label_column(first.features, inputs, args)
    if isinstance(columns, list):
        return DatasetDict({n: _join(s, n, columns) if _has(s, columns) else s for n, s in splits.items()}), LABELS
    if args.label_delimiter:
        return DatasetDict({n: _divide(s, columns, args.label_delimiter) for n, s in splits.items()}), columns
    return DatasetDict(splits), columns


def label_column(features: Any, inputs: Sequence[str], args: DataArguments) -> str | list[str]:
    """The label column, or one column per label: the given one, else `label` or `labels`, else the only class column.

    Raises:
        UserError: the column does not exist or is ambiguous.
    """
    given = args.label_column_name
    for name in [given] if isinstance(given, str) else given or []:
        if name not in features:
            raise UserError(
                f"label_column_name: column {name!r} does not exist.",
                f"The columns are {', '.join(features)}.{nearest(name, features)}",
            )
        if name in inputs:
            raise UserError(f"label_column_name: {name!r} is an input column and cannot also be the label.")
    if given:
        return given[0] if isinstance(given, list) and len(given) == 1 else given
    for name in ("label", LABELS):
        if name in features:
            return name
    classes = [n for n, f in features.items() if isinstance(f, ClassLabel)]
    rest = [n for n in features if n not in inputs]
    if len(classes) == 1 or len(rest) == 1:
        return (classes or rest)[0]
    if not rest:
        raise UserError(
            f"label_column_name: the data has no label column, only inputs ({', '.join(inputs)}).",
            "A table needs a label column; an image folder needs one subfolder per class, and at least two classes.",
        )
    raise UserError(
        "label_column_name: cannot tell which column holds the labels.",
        f"Name one of {', '.join(rest)}, or several columns of 0 and 1, one per label.",
    )


def _has(split: Dataset, columns: Sequence[str]) -> bool:
    return all(c in split.features for c in columns)


def _join(split: Dataset, name: str, columns: list[str]) -> Dataset:
    """`split` with its 0/1 label columns replaced by one column of lists: the names of the columns that are 1."""
    values = [split[c][:] for c in columns]
    for column, cells in zip(columns, values, strict=True):
        invalid = next((v for v in cells if v is not None and (isinstance(v, str) or v not in (0, 1))), None)
        if invalid is not None:
            raise UserError(
                f"label_column_name: column {column!r} of the {name} split contains {invalid!r}, expected 0 or 1.",
                "With several label columns, each stands for one label and holds 1 for the examples that have it.",
            )
    rows = [None if None in row else [i for i, v in enumerate(row) if v] for row in zip(*values, strict=True)]
    return split.remove_columns(columns).add_column(LABELS, rows, feature=datasets.List(ClassLabel(names=columns)))


def _divide(split: Dataset, column: str, delimiter: str) -> Dataset:
    """`split` with delimited names split into lists; empty names are dropped."""
    if column not in split.features:
        return split
    feature = split.features[column]
    if not isinstance(feature, Value) or feature.dtype.startswith("float"):
        raise UserError(
            f"label_delimiter: column {column!r} contains {getattr(feature, 'dtype', 'lists')}, not text to split.",
            "Remove label_delimiter, or set label_column_name to another column.",
        )
    parts = [[p.strip() for p in str("" if v is None else v).split(delimiter)] for v in split[column][:]]
    rows = [[p for p in row if p] for row in parts]
    return split.remove_columns(column).add_column(column, rows, feature=datasets.List(Value("string")))


# ---- problem type and classes --------------------------------------------------------------------------------------


def missing_labels(split: Dataset, column: str) -> list[int]:
    """Rows without a label: None, NaN, or -1, with which hub datasets mark hidden test labels."""
    is_class = isinstance(split.features[column], ClassLabel)
    return [
        i
        for i, v in enumerate(split[column][:])
        if v is None or v != v or (is_class and v == -1) or (isinstance(v, list) and None in v)
    ]


def infer_labels(train: Dataset, column: str, problem_type: str | None, skip_missing: bool = False) -> Labels:
    """Infer problem type and classes from the label column of the training split.

    Lists are multi-label classification and floats are regression, unless they are few distinct whole numbers;
    everything else is single-label classification.

    Raises:
        UserError: missing labels that are not skipped, labels that do not fit `problem_type`, multi-hot vectors
            without class names, or fewer than two classes.
    """
    missing = missing_labels(train, column)
    if missing and (not skip_missing or len(missing) == len(train)):
        raise UserError(
            f"{len(missing)} training examples have no label in column {column!r} (first: row {missing[0]}).",
            "Label or remove them, or set on_bad_example: skip to leave them out.",
        )
    unlabeled = set(missing)
    feature, values = train.features[column], [v for i, v in enumerate(train[column][:]) if i not in unlabeled]
    problem_type = problem_type or _problem_type(feature, values)
    _check_problem_type(problem_type, column, values)
    if problem_type == MULTI_LABEL and _is_many_hot(values) and not _named(feature):
        raise UserError(
            f"Column {column!r} contains multi-hot vectors such as {values[0]}, without class names.",
            "Use lists of class names instead, for example ['red', 'round'].",
        )
    if problem_type == REGRESSION:
        return Labels(problem_type, (column,))
    if _named(feature):
        names = tuple(_source(feature).names)
    else:
        flat = {x for v in values for x in v} if problem_type == MULTI_LABEL else set(values)
        names = tuple(_name(x) for x in sorted(flat, key=lambda x: (isinstance(x, str), x)))
    if len(names) < 2:
        raise UserError(
            f"Column {column!r} has only one class ({', '.join(names)}); classification needs at least two."
        )
    return Labels(problem_type, names)


def _source(feature: Any) -> Any:
    """The feature of a single label: the item feature of a list."""
    return getattr(feature, "feature", None) or feature


def _named(feature: Any) -> bool:
    return isinstance(_source(feature), ClassLabel)


def _problem_type(feature: Any, values: Sequence[Any]) -> str:
    if getattr(feature, "feature", None) is not None:
        return MULTI_LABEL
    is_float = isinstance(feature, Value) and feature.dtype.startswith(("float", "double"))
    is_whole = is_float and all(float(v).is_integer() for v in values) and len(set(values)) <= _WHOLE_NUMBER_CLASSES
    return REGRESSION if is_float and not is_whole else SINGLE_LABEL


def _is_many_hot(values: Sequence[Any]) -> bool:
    lengths = {len(v) for v in values}
    return (
        len(lengths) == 1
        and min(lengths) > 1
        and all(x in (0, 1) and not isinstance(x, str) for v in values for x in v)
    )


def _check_problem_type(problem_type: str, column: str, values: Sequence[Any]) -> None:
    """Check that every label is valid for `problem_type`.

    Raises:
        UserError: one is not.
    """
    fits = {
        REGRESSION: lambda v: isinstance(v, int | float),
        MULTI_LABEL: lambda v: isinstance(v, list) and not any(isinstance(x, list | dict) for x in v),
        SINGLE_LABEL: lambda v: not isinstance(v, list | dict),
    }[problem_type]
    first = next((v for v in values if not fits(v)), None)
    if first is not None:
        expected = {REGRESSION: "numbers", MULTI_LABEL: "lists of classes", SINGLE_LABEL: "one class per example"}
        delimiter = (
            ", or set label_delimiter to the character that separates the classes"
            if problem_type == MULTI_LABEL and isinstance(first, str)
            else ""
        )
        raise UserError(
            f"problem_type: {problem_type} expects {expected[problem_type]}, but column {column!r} contains {first!r}.",
            f"Remove problem_type to infer it from the labels, or set label_column_name to another column{delimiter}.",
        )


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# ---- encoding ------------------------------------------------------------------------------------------------------


def unknown_label(name: str) -> str:
    """The reason why an example whose class is not trained is unusable."""
    return f"unknown label {name!r}"


def bad_labels(split: Dataset, name: str, column: str, labels: Labels) -> dict[int, str]:
    """Row → what is wrong with its label: missing, or not one of `labels`.

    Raises:
        UserError: the column does not exist.
    """
    if column not in split.features:
        raise UserError(f"The {name} split has no column {column!r}.", f"Its columns are {', '.join(split.features)}.")
    reasons = dict.fromkeys(missing_labels(split, column), NO_LABEL)
    if labels.problem_type == REGRESSION:
        return reasons
    class_names, as_name = set(labels.names), _namer(split.features[column])
    for i, value in enumerate(split[column][:]):
        if i not in reasons:
            values = value if isinstance(value, list) else [value]
            unknown = next((text for text in map(as_name, values) if text not in class_names), None)
            if unknown is not None:
                reasons[i] = unknown_label(unknown)
    return reasons


def encode(split: Dataset, name: str, column: str, labels: Labels, fix: str = "") -> Dataset:
    """`split` with a column `labels`.

    A label becomes a class index (single-label), a float vector of zeros and ones, (classes,) (multi-label), or a float
    (regression).

    Args:
        split: raw split.
        name: name of the split, for error messages.
        column: raw label column.
        labels: problem type and classes.
        fix: appended to the suggested fix of error messages.

    Raises:
        UserError: the column does not exist, or has missing or unknown labels.
    """
    if bad := bad_labels(split, name, column, labels):
        _refuse(split, name, column, labels, bad, fix)
    ids, as_name = {n: i for i, n in enumerate(labels.names)}, _namer(split.features[column])
    values = split[column][:]
    _check_problem_type(labels.problem_type, column, values)
    if labels.problem_type == REGRESSION:
        encoded: list[Any] = [float(v) for v in values]
    elif labels.problem_type == MULTI_LABEL:
        positives = [{ids[as_name(v)] for v in row} for row in values]
        encoded = [[1.0 if i in row else 0.0 for i in range(len(ids))] for row in positives]
    else:
        encoded = [ids[as_name(v)] for v in values]
    if LABELS in split.column_names:
        split = split.remove_columns(LABELS)
    return split.add_column(LABELS, encoded)


def _namer(feature: Any) -> Any:
    """The function from a raw label value to its class name."""
    return _source(feature).int2str if _named(feature) else _name


def _refuse(split: Dataset, name: str, column: str, labels: Labels, bad: Mapping[int, str], fix: str) -> None:
    """Report the bad labels of a split.

    Raises:
        UserError: always; lists the missing labels if there are any, else the unknown ones.
    """
    if missing := [row for row, reason in bad.items() if reason == NO_LABEL]:
        raise UserError(
            f"{len(missing)} examples of the {name} split have no label (first: row {missing[0]}).",
            f"Label or remove them. {fix}".strip(),
        )
    as_name, class_names = _namer(split.features[column]), set(labels.names)
    rows = [split[row][column] for row in bad]
    counts = Counter(as_name(v) for row in rows for v in (row if isinstance(row, list) else [row]))
    unknown = {text: count for text, count in counts.items() if text not in class_names}
    listed = ", ".join(repr(text) for text in list(unknown)[:_MAX_SHOWN]) + (" …" if len(unknown) > _MAX_SHOWN else "")
    raise UserError(
        f"The {name} split has {len(bad)} examples with unknown {'label' if len(unknown) == 1 else 'labels'} {listed}.",
        f"The model's labels are {', '.join(labels.names[:_MAX_SHOWN])}"
        f"{' …' if len(labels.names) > _MAX_SHOWN else ''}.{nearest(next(iter(unknown)), labels.names)} {fix}".strip(),
    )


@dataclass(frozen=True)
class Labels:
    """What a model predicts.

    Attributes:
        problem_type: as in `transformers` configurations.
        names: class names in the order of the logits; for regression the name of the target.
    """

    problem_type: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Labels:
        """The labels of a saved model; without `problem_type`, one output is regression and more are single-label."""
        names = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
        default = REGRESSION if len(names) == 1 else SINGLE_LABEL
        return cls(config.problem_type or default, names)

    @property
    def config_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for a `transformers` configuration."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {n: i for i, n in enumerate(self.names)},
            "problem_type": self.problem_type,
        }

    def in_order_of(self, config: PreTrainedConfig) -> Labels:
        """The labels in the checkpoint's order if it has the same ones, so that its head can be kept."""
        own = tuple(str(config.id2label[i]) for i in sorted(config.id2label)) if config.id2label else ()
        return replace(self, names=own) if sorted(own) == sorted(self.names) else self
