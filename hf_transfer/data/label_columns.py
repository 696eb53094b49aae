"""Find the column that holds the labels, and give it one form: names, numbers or lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.columns import label_candidates
from hf_transfer.data.header import check_column
from hf_transfer.data.label_cells import (
    Notation,
    are_shares,
    delimiter_of,
    is_missing,
    is_whole,
    notation,
    number,
    several,
)
from hf_transfer.data.label_checks import check_shares, soft_labels
from hf_transfer.data.label_variants import merged
from hf_transfer.data.label_vectors import named_vectors
from hf_transfer.data.labels import LABELS, MULTI_LABEL, SINGLE_LABEL, Labels
from hf_transfer.data.raw import RawSplits, changed, replaced, with_column
from hf_transfer.errors import UserError, named, option

_MAX_SHOWN = 5
_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_FEW = 20


@dataclass(frozen=True)
class LabelColumn:
    """The labels of the data.

    Attributes:
        splits: the splits with their labels in one column.
        name: its name.
        delimiter: the character that joined the labels of an example, which `splits` no longer hold; None if there was
            none.
        entries: what the entries of vectors stood for, which `splits` no longer hold; empty if there were none.
    """

    splits: RawSplits
    name: str
    delimiter: str | None = None
    entries: tuple[str, ...] = ()


def find_labels(
    splits: Mapping[str, Dataset],
    inputs: Sequence[str],
    args: DataArguments,
    known: Labels | None = None,
    checkpoint: Callable[[], Sequence[str]] = tuple,
) -> LabelColumn:
    """The labels of the data in one column: names, numbers, or lists of names.

    Several 0/1 columns, or one column of delimited names, of written lists or of 0/1 vectors, become one column of
    lists. Numbers that were written as text become numbers where nothing is lost. What was decided is added to the
    notes of the splits.

    Args:
        splits: raw splits; what each column is follows from all of them.
        inputs: the input columns.
        args: data keys; with `problem_type`, nothing is left to decide.
        known: the labels of a trained model, whose names variants are merged into.
        checkpoint: the class names of the checkpoint that is going to be trained, for the entries of vectors.

    Raises:
        UserError: the column does not exist, is ambiguous, or holds invalid values.
    """
    raw = RawSplits.of(splits)
    first = raw.main
    if LABELS in inputs:
        raise UserError(f"the input column is called {LABELS!r}, like the labels that a model is given.", "Rename it.")
    columns = label_column(first, inputs, args)
    if isinstance(columns, list):
        joined = {n: _join(s, n, columns) if _has(s, columns) else s for n, s in raw.items()}
        return LabelColumn(raw.but(joined), LABELS)
    delimiter = args.label_delimiter
    if known is None and _may_be_several(args) and are_shares(cells := _distinct(raw, columns)):
        raise soft_labels(columns, cells[0])
    lists = _as_lists(raw, columns, known is not None) if _is_text(first, columns) and _may_be_several(args) else None
    if lists is not None:
        raw, delimiter = lists, None
    elif delimiter := delimiter or _joined_by(raw, columns, args):
        raw = raw.but({n: _divide(s, columns, delimiter) for n, s in raw.items()})
    elif columns in raw.written and known is None:
        raw = _as_numbers(raw, columns, args.problem_type)
    entries: tuple[str, ...] = ()
    if _may_be_several(args):
        raw, entries = named_vectors(raw, columns, args, known.names if known else (), checkpoint)
    if args.merge_label_variants:
        raw = merged(raw, columns, known)
    return LabelColumn(raw, columns, delimiter, entries)


def label_column(data: Any, inputs: Sequence[str], args: DataArguments) -> str | list[str]:
    """The label column, or one column per label.

    It is the given one, else `label` or `labels`, else the only class column, else the only column that repeats few
    values.

    Args:
        data: a split, or features without examples.
        inputs: the input columns.
        args: data keys.

    Raises:
        UserError: the column does not exist or is ambiguous.
    """
    features = data.features if isinstance(data, Dataset) else data
    given = args.label_column_name
    for name in [given] if isinstance(given, str) else given or []:
        check_column(name, features, "label_column_name")
        if name in inputs:
            raise UserError(f"label_column_name: {name!r} is an input column and cannot also be the label.")
    if given:
        return given[0] if isinstance(given, list) and len(given) == 1 else given
    rest = [n for n in features if n not in (*inputs, args.split_group_column_name)]
    for name in ("label", LABELS):
        if name in rest:
            return name
    classes = [n for n in rest if isinstance(features[n], ClassLabel)]
    if len(classes) == 1 or len(rest) == 1:
        return (classes or rest)[0]
    if not rest:
        raise UserError(
            f"label_column_name: the data has no label column, only inputs ({', '.join(inputs)}).",
            "A table needs a label column; an image folder needs one subfolder per class, and at least two classes.",
        )
    candidates = label_candidates(data, rest) if isinstance(data, Dataset) else rest
    if len(candidates) == 1:
        return candidates[0]
    shown = _values_of(data, candidates) if isinstance(data, Dataset) else ""
    raise UserError(
        "label_column_name: cannot tell which column holds the labels.",
        f"Name one of {named(candidates, 10)}, or several columns of 0 and 1, one per label.{shown}",
    )


def _values_of(split: Dataset, columns: Sequence[str]) -> str:
    """A line to copy for each of the first columns, with what the column holds."""
    lines = []
    for name in columns[:_MAX_SHOWN]:
        feature = split.features[name]
        if isinstance(feature, Value):
            given = split.unique(name)
            shown = named((v for v in given if not is_missing(v)), 4)
            lines.append(f"\n  {option('label_column_name', name)}    {len(given):,} values: {shown}")
    return "".join(lines)


def _has(split: Dataset, columns: Sequence[str]) -> bool:
    return all(c in split.features for c in columns)


def _is_text(split: Dataset, column: str) -> bool:
    feature = split.features.get(column)
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


# ---- several labels ------------------------------------------------------------------------------------------------


def _join(split: Dataset, name: str, columns: list[str]) -> Dataset:
    """`split` with its 0/1 label columns replaced by one column of lists: the names of the columns that are 1."""
    cells = [[_binary(v, name, column) for v in split[column][:]] for column in columns]
    rows = [None if None in row else [i for i, v in enumerate(row) if v] for row in zip(*cells, strict=True)]
    return with_column(split, LABELS, rows, datasets.List(ClassLabel(names=columns)), [*columns, LABELS])


def _binary(value: Any, split: str, column: str) -> int | None:
    if is_missing(value):
        return None
    number = _BINARY.get(value.strip().lower()) if isinstance(value, str) else value
    if number not in (0, 1):
        raise UserError(
            f"label_column_name: column {column!r} of the {split} split contains {value!r}, expected 0 or 1.",
            "With several label columns, each stands for one label and holds 1 for the examples that have it.",
        )
    return int(number)


def _may_be_several(args: DataArguments) -> bool:
    return args.problem_type in (None, MULTI_LABEL)


def _joined_by(raw: RawSplits, column: str, args: DataArguments) -> str | None:
    """The delimiter of the labels where `problem_type` says that an example has several.

    Raises:
        UserError: `problem_type` is not given, and the cells may hold several labels each.
    """
    first = raw.main
    if not _is_text(first, column) or not _may_be_several(args):
        return None
    texts = _distinct(raw, column)
    if not _few(raw, column, texts):
        return None
    delimiter = delimiter_of(texts)
    if delimiter is None or (args.problem_type is None and notation(texts) is not Notation.NAMES):
        return None
    if args.problem_type == MULTI_LABEL:
        raw.notes.append(f"Column {column!r}: the labels of an example are separated by {delimiter!r}.")
        return delimiter
    shown = next(t for t in texts if delimiter in t)
    parts = " and ".join(repr(p.strip()) for p in shown.split(delimiter))
    raise UserError(
        f"column {column!r} can be read in two ways: {shown!r} is one class, or the labels {parts}.",
        f"Set label_delimiter: '{delimiter}' for several labels, or problem_type: single_label_classification for one.",
        key="label_delimiter",
    )


def _few(raw: RawSplits, column: str, texts: Sequence[str]) -> bool:
    """Whether the cells repeat, as labels do."""
    total = sum(len(split) for split in raw.values() if column in split.features)
    return len(texts) <= max(_FEW, total // 2)


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
    return replaced(split, column, [[p for p in row if p] for row in parts], datasets.List(Value("string")))


def _as_lists(raw: RawSplits, column: str, is_known: bool) -> RawSplits | None:
    """The splits with lists in place of cells in which lists were written; None if some cells are no lists.

    Where the labels are known, a cell that is no list stands for itself: an unknown label among good ones.

    Raises:
        UserError: the lists hold shares of several labels, which no problem type trains on.
    """
    texts = _distinct(raw, column)
    lists = [several(t) for t in texts]
    if is_known and any(entry is not None for entry in lists):
        lists = [[t] if entry is None else entry for t, entry in zip(texts, lists, strict=True)]
    if not texts or any(entry is None for entry in lists):
        if sum(entry is not None for entry in lists) > len(texts) / 2:
            raise _not_all_lists(raw, column, next(t for t, entry in zip(texts, lists, strict=True) if entry is None))
        return None
    by_text = dict(zip(texts, lists, strict=True))
    values = [v for entry in lists for v in entry or []]
    check_shares(column, [entry or [] for entry in lists])
    whole = all(v is None or isinstance(v, int | float) for v in values)
    feature = datasets.List(Value("int64" if whole else "string"))
    convert: Callable[[Any], Any] = int if whole else str
    read = lambda v: None if is_missing(v) else [x if x is None else convert(x) for x in by_text[v] or []]  # noqa: E731
    raw = raw.but({n: changed(s, column, read, feature) for n, s in raw.items()})
    raw.notes.append(f"Column {column!r}: lists written as text, such as {texts[0]}, read as several labels.")
    return raw


def _not_all_lists(raw: RawSplits, column: str, odd: str) -> UserError:
    name, row = next((n, s[column][:].index(odd)) for n, s in raw.items() if odd in s.unique(column))
    return UserError(
        f"{raw.place(name, row)}: the label {odd!r} is not a list, unlike most others in column {column!r}.",
        "Write all of them as lists, or set problem_type: single_label_classification if they are names.",
        key="label_column_name",
    )


# ---- numbers -------------------------------------------------------------------------------------------------------


def _as_numbers(raw: RawSplits, column: str, problem_type: str | None) -> RawSplits:
    """The splits with numbers in place of cells that were written as numbers, where nothing is lost by it.

    Classes become numbers only where they are whole, so that 10 comes after 2; a regression reads its own numbers.
    """
    texts = _distinct(raw, column)
    if not texts or not _is_text(raw.main, column):
        return raw
    if problem_type is not None and not (problem_type == SINGLE_LABEL and is_whole(texts)):
        return raw
    kind = notation(texts)
    if kind is Notation.LOOSE:
        raw.notes.append(
            f"Column {column!r}: classes named as they are written ({', '.join(texts[:_MAX_SHOWN])}); "
            f"{option('problem_type', 'regression')} reads them as numbers."
        )
    if kind is Notation.LOOSE or kind is Notation.NAMES:
        return raw
    if kind in (Notation.COMMA, Notation.UNIT):
        raw.notes.append(
            f"Column {column!r}: {kind.value}; {texts[0]!r} is {number(texts[0]):g}. "
            f"{option('problem_type', 'single_label_classification')} keeps them as names."
        )
    whole = kind is Notation.WHOLE
    read = lambda v: None if is_missing(v) else int(v) if whole else number(v)  # noqa: E731
    return raw.but({n: changed(s, column, read, Value("int64" if whole else "float64")) for n, s in raw.items()})


# ---- details -------------------------------------------------------------------------------------------------------


def _distinct(raw: RawSplits, column: str) -> list[str]:
    """The different labels of a text column over all splits, in order of appearance, without the missing ones."""
    cells: Iterable[Any] = (v for s in raw.values() if _is_text(s, column) for v in s.unique(column))
    return list(dict.fromkeys(v for v in cells if not is_missing(v)))
