"""The labels of a data set: which column they are in, what they mean, and as numbers."""

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
_MOST_SHOWN = 10
_WHOLE_NUMBER_CLASSES = 20  # a column of floats with no fraction and at most so many values holds classes


# ---- columns -------------------------------------------------------------------------------------------------------


def find_labels(splits: Mapping[str, Dataset], inputs: Sequence[str], args: DataArguments) -> tuple[DatasetDict, str]:
    """(the splits with their labels in one column, its name).

    Several columns of 0 and 1, and one column of names with a delimiter, become a column of lists of names.

    Raises:
        UserError: the column is not there, or several could be meant, or it does not hold what it should.
    """
    first = next(iter(splits.values()))
    found = label_column(first.features, inputs, args)
    if isinstance(found, list):
        return DatasetDict({n: _join(s, n, found) if _has(s, found) else s for n, s in splits.items()}), LABELS
    if args.label_delimiter:
        return DatasetDict({n: _divide(s, found, args.label_delimiter) for n, s in splits.items()}), found
    return DatasetDict(splits), found


def label_column(features: Any, inputs: Sequence[str], args: DataArguments) -> str | list[str]:
    """The label column, or one column per label: as given, else `label` or `labels`, else the only class column.

    Raises:
        UserError: it is not there, or several could be meant.
    """
    given = args.label_column_name
    for name in [given] if isinstance(given, str) else given or []:
        if name not in features:
            raise UserError(
                f"label_column_name: there is no column {name!r}.",
                f"There are {', '.join(features)}.{nearest(name, features)}",
            )
        if name in inputs:
            raise UserError(f"label_column_name: {name!r} is the input, and cannot be the label too.")
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
            f"label_column_name: the data has inputs only ({', '.join(inputs)}), and no labels.",
            "A table needs a label column; an image folder needs a folder for each of two classes or more.",
        )
    raise UserError(
        "label_column_name: the label column is not plain.",
        f"Name one of {', '.join(rest)}; or several, where each holds 0 or 1 for one label.",
    )


def _has(split: Dataset, columns: Sequence[str]) -> bool:
    return all(c in split.features for c in columns)


def _join(split: Dataset, name: str, columns: list[str]) -> Dataset:
    """`split` with the names of the columns that hold 1, in place of the columns."""
    values = [split[c][:] for c in columns]
    for column, cells in zip(columns, values, strict=True):
        wrong = next((v for v in cells if v is not None and (isinstance(v, str) or v not in (0, 1))), None)
        if wrong is not None:
            raise UserError(
                f"label_column_name: column {column!r} of the {name} split holds {wrong!r}, not 0 or 1.",
                "Several label columns are one per label, with 1 where an example has it.",
            )
    rows = [None if None in row else [i for i, v in enumerate(row) if v] for row in zip(*values, strict=True)]
    return split.remove_columns(columns).add_column(LABELS, rows, feature=datasets.List(ClassLabel(names=columns)))


def _divide(split: Dataset, column: str, delimiter: str) -> Dataset:
    """`split` with lists of names in place of texts that join them; an empty text is no name."""
    if column not in split.features:
        return split
    feature = split.features[column]
    if not isinstance(feature, Value) or feature.dtype.startswith("float"):
        raise UserError(
            f"label_delimiter: column {column!r} holds {getattr(feature, 'dtype', 'lists')}, not texts to divide.",
            "Leave label_delimiter out, or name another label_column_name.",
        )
    parts = [[p.strip() for p in str("" if v is None else v).split(delimiter)] for v in split[column][:]]
    rows = [[p for p in row if p] for row in parts]
    return split.remove_columns(column).add_column(column, rows, feature=datasets.List(Value("string")))


# ---- what they mean ------------------------------------------------------------------------------------------------


def missing_labels(split: Dataset, column: str) -> list[int]:
    """Rows without a label: none, NaN, or the hub's -1 for a class that is kept secret."""
    is_class = isinstance(split.features[column], ClassLabel)
    return [
        i
        for i, v in enumerate(split[column][:])
        if v is None or v != v or (is_class and v == -1) or (isinstance(v, list) and None in v)
    ]


def infer_labels(train: Dataset, column: str, problem_type: str | None, skip_missing: bool = False) -> Labels:
    """Problem type and classes of a label column, from the training split.

    Floats are a regression, lists are multi-label, everything else is one class of several.

    Raises:
        UserError: missing labels (unless they are skipped), or fewer than two classes.
    """
    missing = missing_labels(train, column)
    if missing and (not skip_missing or len(missing) == len(train)):
        raise UserError(
            f"{len(missing)} training examples have no label in column {column!r}, the first is row {missing[0]}.",
            "Remove them or give them one, or leave them out with on_bad_example: skip.",
        )
    gaps = set(missing)
    feature, values = train.features[column], [v for i, v in enumerate(train[column][:]) if i not in gaps]
    problem_type = problem_type or _problem_type(feature, values)
    _check_problem_type(problem_type, column, values)
    if problem_type == MULTI_LABEL and _is_many_hot(values) and not _named(feature):
        raise UserError(
            f"Column {column!r} holds a 0 or 1 for each class ({values[0]}): its classes have no names.",
            "Give the names of an example's classes instead, for example ['red', 'round'].",
        )
    if problem_type == REGRESSION:
        return Labels(problem_type, (column,))
    if _named(feature):
        names = tuple(_source(feature).names)
    else:
        flat = {x for v in values for x in v} if problem_type == MULTI_LABEL else set(values)
        names = tuple(_name(x) for x in sorted(flat, key=lambda x: (isinstance(x, str), x)))
    if len(names) < 2:
        raise UserError(f"Column {column!r} has one class only ({', '.join(names)}): there is nothing to learn.")
    return Labels(problem_type, names)


def _source(feature: Any) -> Any:
    """The feature of one label, also where an example has a list of them."""
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
    """Whether every label can be what `problem_type` says.

    Raises:
        UserError: one cannot.
    """
    fits = {
        REGRESSION: lambda v: isinstance(v, int | float),
        MULTI_LABEL: lambda v: isinstance(v, list) and not any(isinstance(x, list | dict) for x in v),
        SINGLE_LABEL: lambda v: not isinstance(v, list | dict),
    }[problem_type]
    first = next((v for v in values if not fits(v)), None)
    if first is not None:
        wanted = {REGRESSION: "numbers", MULTI_LABEL: "lists of classes", SINGLE_LABEL: "one class each"}
        more = (
            ", or set label_delimiter to what stands between the classes"
            if problem_type == MULTI_LABEL and isinstance(first, str)
            else ""
        )
        raise UserError(
            f"problem_type: {problem_type} wants {wanted[problem_type]}, and column {column!r} holds {first!r}.",
            f"Leave problem_type out to have it seen from the labels, or name another label_column_name{more}.",
        )


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# ---- as numbers ----------------------------------------------------------------------------------------------------


def bad_labels(split: Dataset, name: str, column: str, labels: Labels) -> dict[int, str]:
    """Row → what is wrong with its label: it has none, or one that the model does not learn.

    Raises:
        UserError: no such column.
    """
    if column not in split.features:
        raise UserError(f"The {name} split has no column {column!r}.", f"It has {', '.join(split.features)}.")
    found = dict.fromkeys(missing_labels(split, column), "it has no label")
    if labels.problem_type == REGRESSION:
        return found
    known, as_name = set(labels.names), _namer(split.features[column])
    for i, value in enumerate(split[column][:]):
        if i not in found:
            values = value if isinstance(value, list) else [value]
            unknown = next((text for text in map(as_name, values) if text not in known), None)
            if unknown is not None:
                found[i] = f"its label {unknown!r} is not learnt"
    return found


def encode(split: Dataset, name: str, column: str, labels: Labels, fix: str = "") -> Dataset:
    """`split` with a column `labels`: class indices, 0/1 vectors of float, or float values.

    Raises:
        UserError: no such column, missing labels, or labels that the training split does not have.
    """
    if bad := bad_labels(split, name, column, labels):
        _refuse(split, name, column, labels, bad, fix)
    ids, as_name = {n: i for i, n in enumerate(labels.names)}, _namer(split.features[column])
    values = split[column][:]
    _check_problem_type(labels.problem_type, column, values)
    if labels.problem_type == REGRESSION:
        encoded: list[Any] = [float(v) for v in values]
    elif labels.problem_type == MULTI_LABEL:
        chosen = [{ids[as_name(v)] for v in row} for row in values]
        encoded = [[1.0 if i in row else 0.0 for i in range(len(ids))] for row in chosen]
    else:
        encoded = [ids[as_name(v)] for v in values]
    if LABELS in split.column_names:
        split = split.remove_columns(LABELS)
    return split.add_column(LABELS, encoded)


def _namer(feature: Any) -> Any:
    """The function from a label's value to its name."""
    return _source(feature).int2str if _named(feature) else _name


def _refuse(split: Dataset, name: str, column: str, labels: Labels, bad: Mapping[int, str], fix: str) -> None:
    """Raises:
    UserError: says which labels are missing, or else which the model does not learn.
    """
    if missing := [row for row, why in bad.items() if why == "it has no label"]:
        raise UserError(
            f"{len(missing)} examples of the {name} split have no label, the first is row {missing[0]}.",
            f"Remove them or give them one. {fix}".strip(),
        )
    as_name, known = _namer(split.features[column]), set(labels.names)
    rows = [split[row][column] for row in bad]
    counts = Counter(as_name(v) for row in rows for v in (row if isinstance(row, list) else [row]))
    unknown = {text: count for text, count in counts.items() if text not in known}
    listed = ", ".join(repr(text) for text in list(unknown)[:_MOST_SHOWN]) + (
        " …" if len(unknown) > _MOST_SHOWN else ""
    )
    which = f"label {listed}, which is none" if len(unknown) == 1 else f"labels {listed}, which are none"
    raise UserError(
        f"The {name} split has the {which} of those that the model learns ({len(bad)} examples).",
        f"They are {', '.join(labels.names[:_MOST_SHOWN])}{' …' if len(labels.names) > _MOST_SHOWN else ''}."
        f"{nearest(next(iter(unknown)), labels.names)} {fix}".strip(),
    )


@dataclass(frozen=True)
class Labels:
    """What a model predicts.

    Attributes:
        problem_type: as in `transformers` configurations.
        names: the classes, or the one value of a regression.
    """

    problem_type: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Labels:
        """What a saved model predicts."""
        names = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
        silent = "regression" if len(names) == 1 else "single_label_classification"
        return cls(config.problem_type or silent, names)

    @property
    def config_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {n: i for i, n in enumerate(self.names)},
            "problem_type": self.problem_type,
        }

    def in_order_of(self, config: PreTrainedConfig) -> Labels:
        """The same labels in the checkpoint's order where it has the same ones, so that its head can be kept."""
        own = tuple(str(config.id2label[i]) for i in sorted(config.id2label)) if config.id2label else ()
        return replace(self, names=own) if sorted(own) == sorted(self.names) else self
