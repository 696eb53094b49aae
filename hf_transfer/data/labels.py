"""The labels of a dataset: infer problem type and classes, encode them as numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedConfig

from hf_transfer.data.label_cells import is_missing, name_of, number
from hf_transfer.data.label_checks import check_classes, check_shares
from hf_transfer.data.raw import with_column
from hf_transfer.errors import UserError, nearest, shortened

LABELS = "labels"
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
NO_LABEL = "missing label"
IGNORED = -100  # a class index that counts for nothing, as in transformers
_MAX_SHOWN = 10
_MAX_FLOAT = 3.4e38  # of float32
_WHOLE_NUMBER_CLASSES = 20  # a float column with only whole numbers and at most this many distinct values is classes


# ---- problem type and classes --------------------------------------------------------------------------------------


def missing_labels(split: Dataset, column: str) -> list[int]:
    """Rows without a label: None, NaN, blank, or -1, with which hub datasets mark hidden test labels."""
    is_class = isinstance(split.features[column], ClassLabel)
    return [
        i
        for i, v in enumerate(split[column][:])
        if is_missing(v) or (is_class and v == -1) or (isinstance(v, list) and None in v)
    ]


def infer_labels(
    train: Dataset, column: str, problem_type: str | None, skip_missing: bool = False, names: tuple[str, ...] = ()
) -> Labels:
    """Infer problem type and classes from the label column of the training split.

    Lists are multi-label classification and floats are regression, unless they are few distinct whole numbers, or whole
    numbers beside missing ones (which turn integers into floats); everything else is single-label classification.

    Args:
        train: training split.
        column: its label column.
        problem_type: the key.
        skip_missing: whether examples without a label are left out later.
        names: the classes, where they are known already.

    Raises:
        UserError: missing labels that are not skipped, labels that do not fit `problem_type`, lists of fractions, fewer
            than two classes, or as many classes as examples.
    """
    missing = missing_labels(train, column)
    if missing and (not skip_missing or len(missing) == len(train)):
        raise UserError(
            f"{len(missing)} training examples have no label in column {column!r} (first: row {missing[0]}).",
            "Label or remove them, or set on_bad_example: skip to leave them out.",
        )
    unlabeled = set(missing)
    feature, values = train.features[column], [v for i, v in enumerate(train[column][:]) if i not in unlabeled]
    inferred = problem_type or _problem_type(feature, values, bool(missing))
    check_shares(column, [v for v in values if isinstance(v, dict)])
    _check_problem_type(inferred, column, values)
    if inferred == REGRESSION:
        if not skip_missing and (bad := bad_labels(train, "train", column, Labels(REGRESSION, (column,)))):
            row, reason = next(iter(bad.items()))
            raise UserError(f"row {row} of the train split: {reason}.", "Correct it, or set on_bad_example: skip.")
        return Labels(inferred, (column,))
    if inferred == MULTI_LABEL and not _named(feature):
        check_shares(column, values)
    names = names or _class_names(feature, values, inferred)
    check_classes(column, values, names, checked=problem_type is not None or _named(feature))
    return Labels(inferred, names)


def _class_names(feature: Any, values: Sequence[Any], problem_type: str) -> tuple[str, ...]:
    if _named(feature):
        return tuple(_source(feature).names)
    flat = {x for v in values for x in v} if problem_type == MULTI_LABEL else set(values)
    return tuple(dict.fromkeys(name_of(x) for x in sorted(flat, key=lambda x: (isinstance(x, str), x))))


def _source(feature: Any) -> Any:
    """The feature of a single label: the item feature of a list."""
    return getattr(feature, "feature", None) or feature


def _named(feature: Any) -> bool:
    return isinstance(_source(feature), ClassLabel)


def _problem_type(feature: Any, values: Sequence[Any], some_missing: bool) -> str:
    if getattr(feature, "feature", None) is not None:
        return MULTI_LABEL
    is_float = isinstance(feature, Value) and feature.dtype.startswith(("float", "double", "decimal"))
    is_whole = is_float and all(math.isfinite(v) and v == int(v) for v in values)
    are_classes = is_whole and (some_missing or len(set(values)) <= _WHOLE_NUMBER_CLASSES)
    return REGRESSION if is_float and not are_classes else SINGLE_LABEL


def _check_problem_type(problem_type: str, column: str, values: Sequence[Any]) -> None:
    """Check that every label is valid for `problem_type`.

    Raises:
        UserError: one is not.
    """
    fits = {
        REGRESSION: lambda v: number(v) is not None,
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
    wrong = _wrong_number if labels.problem_type == REGRESSION else _unknown(split.features[column], labels)
    for i, value in enumerate(split[column][:]):
        if i not in reasons and (reason := wrong(value)):
            reasons[i] = reason
    return reasons


def _wrong_number(value: Any) -> str:
    """Why a label is no number to train on; empty if it is one."""
    read = number(value)
    if read is None:
        return f"its label {value!r} is not a number"
    return "" if abs(read) <= _MAX_FLOAT else f"its label {value} is not a finite number"


def _unknown(feature: Any, labels: Labels) -> Callable[[Any], str]:
    """The function that says why a label is none of `labels`; empty if it is one."""
    as_name, known = _namer(feature, labels.names), set(labels.names)

    def reason(value: Any) -> str:
        names = map(as_name, value if isinstance(value, list) else [value])
        unknown = next((name for name in names if name not in known), None)
        return "" if unknown is None else unknown_label(unknown)

    return reason


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
    ids, as_name = {n: i for i, n in enumerate(labels.names)}, _namer(split.features[column], labels.names)
    values = split[column][:]
    _check_problem_type(labels.problem_type, column, values)
    if labels.problem_type == REGRESSION:
        encoded: list[Any] = [number(v) for v in values]
    elif labels.problem_type == MULTI_LABEL:
        positives = [{ids[as_name(v)] for v in row} for row in values]
        encoded = [[1.0 if i in row else 0.0 for i in range(len(ids))] for row in positives]
    else:
        encoded = [ids[as_name(v)] for v in values]
    return with_column(split, LABELS, encoded, None, [LABELS])


def _namer(feature: Any, names: Collection[str]) -> Callable[[Any], str]:
    """The function from a raw label value to its class name.

    `1.0` is class `1` where that is a class and `1.0` is none: tables with missing labels hold integers as floats. `1`
    is class `LABEL_1` of a checkpoint whose classes have no better names.
    """
    if _named(feature):
        int2str: Callable[[Any], str] = _source(feature).int2str
        return int2str
    known = set(names)

    def name(value: Any) -> str:
        written = name_of(value)
        if written in known:
            return written
        whole, point, decimals = written.partition(".")
        whole = whole if point and not decimals.strip("0") else written
        return f"LABEL_{whole}" if f"LABEL_{whole}" in known else whole

    return name


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
    as_name, class_names = _namer(split.features[column], labels.names), set(labels.names)
    if labels.problem_type == REGRESSION:
        row, reason = next(iter(bad.items()))
        raise UserError(f"row {row} of the {name} split: {reason}.", f"Correct it. {fix}".strip())
    rows = [split[row][column] for row in bad]
    counts = Counter(as_name(v) for row in rows for v in (row if isinstance(row, list) else [row]))
    unknown = {text: count for text, count in counts.items() if text not in class_names}
    shown = ", ".join(repr(shortened(text)) for text in list(unknown)[:_MAX_SHOWN])
    shown += " …" if len(unknown) > _MAX_SHOWN else ""
    raise UserError(
        f"The {name} split has {len(bad)} examples with unknown {'label' if len(unknown) == 1 else 'labels'} {shown}.",
        f"The model's labels are {', '.join(map(shortened, labels.names[:_MAX_SHOWN]))}"
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

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return self.names[index]

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

    def in_words(self, label: Any) -> str:
        """An encoded label as text: a class's name, the names of several, or a number."""
        if self.problem_type == REGRESSION:
            return f"{float(label):g}"
        if self.problem_type == MULTI_LABEL:
            return ", ".join(name for name, has in zip(self.names, label, strict=True) if has > 0.5)
        return self.names[int(label)]

    def in_order_of(self, config: PreTrainedConfig) -> Labels:
        """The labels in the checkpoint's order if it has the same ones, so that its head can be kept."""
        own = tuple(str(config.id2label[i]) for i in sorted(config.id2label)) if config.id2label else ()
        if self.generic(config):
            return replace(self, names=tuple(map(str, range(len(own)))))
        return replace(self, names=own) if sorted(own) == sorted(self.names) else self

    def generic(self, config: PreTrainedConfig) -> bool:
        """Whether these are 0, 1, 2, … and the checkpoint calls its classes LABEL_0, LABEL_1, LABEL_2, …"""
        own = {str(name) for name in (config.id2label or {}).values()}
        numbers = range(len(self.names))
        return set(self.names) == {str(i) for i in numbers} and own == {f"LABEL_{i}" for i in numbers}
