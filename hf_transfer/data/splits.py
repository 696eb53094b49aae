"""From raw splits to the splits of a run: encode labels, hold out a validation split, draw the requested samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image, Value, concatenate_datasets

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.draws import Array, class_counts, draw
from hf_transfer.data.groups import check_column, draw_groups, groups_of, without_group
from hf_transfer.data.labels import LABELS, SINGLE_LABEL, Labels, bad_labels, encode, missing_labels, unknown_label
from hf_transfer.data.raw import BadExample, RawSplits, places
from hf_transfer.errors import UserError, named, shortened

SHARE, FEWER, SHARE_OF_FEWER = 0.1, 500, 0.2  # held out for validation; below so many examples the other share
ROW = "__row__"  # column holding an example's row in the input data
Choose = Callable[[Dataset], Array]


@dataclass(frozen=True)
class Data:
    """Splits ready for a task: unchanged input columns, and the encoded column `labels`.

    Attributes:
        train: training split.
        validation: validation split.
        test: test split, or None if the data has none.
        inputs: names of the input columns.
        labels: problem type and class names.
        notes: messages for the user.
        skipped: examples left out under `on_bad_example: skip`.
        drawn_from: the split that the validation split was drawn from; None if the data has a validation split.
        files: the tables of each split of the input data, each with its number of rows; see `RawSplits`.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    inputs: tuple[str, ...]
    labels: Labels
    notes: tuple[str, ...] = ()
    skipped: tuple[BadExample, ...] = ()
    drawn_from: str | None = None
    files: Mapping[str, Sequence[tuple[Path, int]]] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Dataset]:
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {k: v for k, v in named.items() if v is not None}

    def given_split(self, name: str) -> str:
        """The split of the input data that the examples of split `name` come from."""
        return (self.drawn_from or name) if name == "validation" else name

    def name_of(self, split: str, position: int) -> str:
        """How to find an example in the input data; see `name_of`."""
        return name_of(self.splits[split], self.inputs, position)

    def places(self, split: str, positions: Sequence[int]) -> list[str]:
        """Where examples of a split stand in the input data: file and line, or row."""
        given = self.given_split(split)
        rows = self.splits[split].select(positions)[ROW][:]
        return places(self.files.get(given, ()), given, rows)


def name_of(split: Dataset, inputs: Sequence[str], position: int) -> str:
    """How to find an example in the input data: its row, with the file name of an image or the start of a text.

    Args:
        split: with the column `ROW`.
        inputs: names of the input columns.
        position: of the example in `split`.
    """
    row = split.select([position]).select_columns([inputs[0], ROW])
    if isinstance(row.features[inputs[0]], Image):
        row = row.cast_column(inputs[0], Image(decode=False))
    example = row[0]
    value = example[inputs[0]]
    path = value.get("path") if isinstance(value, dict) else None
    text = f" ({value[:40]!r})" if isinstance(value, str) and value.strip() else ""
    return f"{Path(path).name} (row {example[ROW]})" if path else f"row {example[ROW]}{text}"


def make_data(
    splits: DatasetDict,
    inputs: tuple[str, ...],
    column: str,
    labels: Labels,
    args: DataArguments,
    seed: int,
    choose: Choose | None = None,
) -> Data:
    """Encode the labels, hold out a validation split if there is none, and draw the requested numbers of examples.

    Args:
        splits: raw splits.
        inputs: names of the input columns.
        column: raw label column.
        labels: problem type and classes.
        args: data keys.
        seed: of the draws.
        choose: the positions of the training examples that are held out for validation, instead of a draw.

    Raises:
        UserError: a split lacks a column, has missing or unknown labels that are not skipped, or would be empty, or a
            class or a group makes a draw impossible.
    """
    left_out, files = RawSplits.of(splits).bad, RawSplits.of(splits).files
    splits, notes = _without_unlabeled_test(splits, column)
    if args.split_group_column_name:
        check_column(splits["train"], args.split_group_column_name, column)
    encoded, skipped = _encode_splits(splits, inputs, column, labels, args)
    skipped = [*left_out, *skipped]
    encoded, untrained = _without_untrained_classes(encoded, labels, args)
    skipped += untrained
    for name, split in encoded.items():
        if len(split) == 0:
            reason = next(bad.reason for bad in skipped if bad.split == name)
            raise UserError(f"No examples are left in the {name} split: all were skipped (the first one: {reason}).")
    drawn_from = None if "validation" in encoded else "train"
    if drawn_from and choose is not None:
        encoded |= _divided(encoded["train"], choose(encoded["train"]))
    elif drawn_from:
        encoded, note = _hold_out(encoded, labels, args, seed)
        notes.append(note)
    encoded = _limited(encoded, labels, args, seed)
    return Data(
        encoded["train"],
        encoded["validation"],
        encoded.get("test"),
        inputs,
        labels,
        tuple(notes),
        tuple(skipped),
        drawn_from,
        files,
    )


def held_out_share(args: DataArguments, examples: int) -> float:
    """The fraction of the training set that is held out if there is no validation split."""
    return args.train_val_split or (SHARE if examples >= FEWER else SHARE_OF_FEWER)


def encode_split(
    split: Dataset, name: str, column: str, labels: Labels, args: DataArguments
) -> tuple[Dataset, list[BadExample]]:
    """(`split` with the columns `labels` and `ROW`, the examples skipped because of their label).

    Raises:
        UserError: it has missing or unknown labels, and they are not skipped.
    """
    rows, skipped = list(range(len(split))), list[BadExample]()
    if args.on_bad_example == "skip":
        bad = bad_labels(split, name, column, labels)
        skipped = [BadExample(name, f"row {row}", reason) for row, reason in bad.items()]
        rows = [row for row in rows if row not in bad]
        split = split.select(rows) if bad else split
    split = encode(split, name, column, labels, "`on_bad_example: skip` leaves such examples out.")
    return split.add_column(ROW, rows), skipped


def _encode_splits(
    splits: DatasetDict, inputs: tuple[str, ...], column: str, labels: Labels, args: DataArguments
) -> tuple[dict[str, Dataset], list[BadExample]]:
    """(encoded splits, examples skipped because of their label or because they belong to no group)."""
    for name, split in splits.items():
        if missing := [c for c in inputs if c not in split.features]:
            raise UserError(
                f"The {name} split has no column {missing[0]!r}, which the training split has.",
                f"Its columns are {', '.join(split.features)}.",
            )
    encoded, skipped = {}, list[BadExample]()
    for name in ("train", "validation", "test"):
        if name in splits:
            split = _typed_as(splits["train"], splits[name], name, inputs)
            encoded[name], bad = encode_split(split, name, column, labels, args)
            skipped += bad
    if args.split_group_column_name and "validation" not in encoded:
        split = encoded["train"]
        lost = without_group(split, args.split_group_column_name, args.on_bad_example == "skip")
        rows = split[ROW][:]
        skipped += [BadExample("train", f"row {rows[i]}", reason) for i, reason in lost.items()]
        encoded["train"] = split.select([i for i in range(len(split)) if i not in lost]) if lost else split
    return encoded, skipped


def _typed_as(train: Dataset, split: Dataset, name: str, inputs: Sequence[str]) -> Dataset:
    """`split` with texts where the training split has texts: a file whose texts are all whole numbers, or all missing,
    has columns of another type.

    Raises:
        UserError: a column of another type cannot become text as it was written.
    """
    for column in inputs:
        wanted, feature = train.features[column], split.features[column]
        if not _is_text(wanted) or _is_text(feature):
            continue
        if not (isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "null"))):
            raise UserError(
                f"Column {column!r} contains {getattr(feature, 'dtype', 'no text')} in the {name} split, but text in "
                "the training split.",
                "Write its values as text.",
            )
        split = split.cast_column(column, Value("string"))
    return split


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _without_untrained_classes(
    encoded: dict[str, Dataset], labels: Labels, args: DataArguments
) -> tuple[dict[str, Dataset], list[BadExample]]:
    """(splits without held-out examples of classes that have no training example, the skipped examples).

    Raises:
        UserError: there are such examples, and they are not skipped.
    """
    if labels.problem_type != SINGLE_LABEL:
        return encoded, []
    trained, skipped = set(encoded["train"][LABELS][:]), list[BadExample]()
    for name, split in encoded.items():
        values = split[LABELS][:]
        unseen = sorted(set(values) - trained)
        if unseen:
            names = ", ".join(repr(shortened(labels.names[i])) for i in unseen[:10])
            if args.on_bad_example != "skip":
                raise UserError(
                    f"The {name} split has examples of class {names}, but the training split has none.",
                    "Add training examples, or set on_bad_example: skip to leave these out.",
                )
            bad = {i: labels.names[v] for i, v in enumerate(values) if v not in trained}
            rows = split[ROW][:]
            skipped += [BadExample(name, f"row {rows[i]}", unknown_label(v)) for i, v in bad.items()]
            encoded[name] = split.select([i for i in range(len(split)) if i not in bad])
    return encoded, skipped


def _hold_out(
    encoded: dict[str, Dataset], labels: Labels, args: DataArguments, seed: int
) -> tuple[dict[str, Dataset], str]:
    """(the splits with a validation split drawn from the training split, a note about it).

    Raises:
        UserError: no example can be held out.
    """
    train, column = encoded["train"], args.split_group_column_name
    total = len(train)
    share = held_out_share(args, total)
    size = math.ceil(total * share)
    if size >= total:
        raise UserError(
            f"The training split has {total} examples, too few to hold some out for validation.",
            "Provide more examples, or a validation split.",
        )
    if column:
        parts, how = _divided(train, draw_groups(train, column, size, labels, seed)), "sample of whole groups"
    else:
        drawn = draw(train, size, labels, seed, keep="rest")
        parts, how = {"train": drawn.rest, "validation": drawn.sample}, "random sample"
        how = "stratified sample" if drawn.stratified else how
    size = len(parts["validation"])
    if not size:
        raise UserError(
            f"No class of the training split has two examples ({total:,} examples), so none can be held out for "
            "validation.",
            "Provide more examples, or a validation split.",
        )
    note = (
        f"No validation split: {size} of {total} training examples are held out for validation "
        f"({how}, train_val_split: {share:g}, seed {seed})."
    )
    if column:
        held, every = (len(set(groups_of(s, column))) for s in (parts["validation"], train))
        note += f" They are all examples of {held:,} of {every:,} values of {column!r}."
    single = [labels.names[i] for i in np.flatnonzero(class_counts(train, labels) == 1)]
    if single:
        note += f" Classes with a single example, which stays in training: {named(single)}."
    return encoded | parts, note


def with_every_class(data: Data, group_column: str | None) -> Data:
    """`data` with held-out examples returned to training where a class would have none: those that the draw had left to
    it turned out to be unusable.

    Args:
        data: the splits; nothing is changed if the validation split is the data's own.
        group_column: their groups are returned with them.
    """
    lost = class_counts(data.train, data.labels) == 0
    if not (data.drawn_from and lost.any()):
        return data
    rows = np.array(data.validation[LABELS][:])
    members = rows[:, lost].any(1) if rows.ndim > 1 else np.isin(rows, np.flatnonzero(lost))
    if group_column:
        groups = np.array(groups_of(data.validation, group_column))
        members = np.isin(groups, groups[members])
    if not members.any() or members.all():
        return data
    returned = data.validation.select(np.flatnonzero(members))
    note = (
        f"{len(returned):,} examples drawn for validation train after all: no other usable example of "
        f"{named(data.labels.names[i] for i in np.flatnonzero(lost))} is left."
    )
    return replace(
        data,
        train=concatenate_datasets([data.train, returned]),
        validation=data.validation.select(np.flatnonzero(~members)),
        notes=(*data.notes, note),
    )


def _divided(train: Dataset, held_out: Array) -> dict[str, Dataset]:
    """The training split without the examples at some positions, and these as validation split."""
    rest = np.setdiff1d(np.arange(len(train)), held_out)
    return {"train": train.select(rest), "validation": train.select(held_out)}


def _limited(encoded: dict[str, Dataset], labels: Labels, args: DataArguments, seed: int) -> dict[str, Dataset]:
    """The splits with at most the requested numbers of examples.

    The training sample keeps every class, as far as it has examples for them; the data facts warn of the others.
    """
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    limited = dict(encoded)
    for name, limit in limits.items():
        if limit is not None and name in encoded and limit < len(encoded[name]):
            limited[name] = draw(encoded[name], limit, labels, seed, keep="sample" if name == "train" else None).sample
    return limited


def _without_unlabeled_test(splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """(splits without a test split that has no labels at all, as competitions publish them, notes)."""
    test = splits.get("test")
    if test is None or (column in test.features and len(missing_labels(test, column)) < len(test)):
        return splits, []
    rest = DatasetDict({name: split for name, split in splits.items() if name != "test"})
    return rest, [f"The test split has no labels: its {len(test):,} examples are left out."]
