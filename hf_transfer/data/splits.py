"""From raw splits to the splits of a run: encode labels, hold out a validation split, draw the requested samples."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.labels import LABELS, SINGLE_LABEL, Labels, bad_labels, encode, missing_labels, unknown_label
from hf_transfer.data.raw import BadExample, RawSplits
from hf_transfer.errors import UserError

ROW = "__row__"  # column holding an example's row in the input data


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
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    inputs: tuple[str, ...]
    labels: Labels
    notes: tuple[str, ...] = ()
    skipped: tuple[BadExample, ...] = ()
    drawn_from: str | None = None

    @property
    def splits(self) -> dict[str, Dataset]:
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {k: v for k, v in named.items() if v is not None}

    def given_split(self, name: str) -> str:
        """The split of the input data that the examples of split `name` come from."""
        return (self.drawn_from or name) if name == "validation" else name

    def name_of(self, split: str, position: int) -> str:
        """How to find an example in the input data: its row, with the file name of an image or the start of a text."""
        row = self.splits[split].select([position]).select_columns([self.inputs[0], ROW])
        if isinstance(row.features[self.inputs[0]], Image):
            row = row.cast_column(self.inputs[0], Image(decode=False))
        example = row[0]
        value = example[self.inputs[0]]
        path = value.get("path") if isinstance(value, dict) else None
        text = f" ({value[:40]!r})" if isinstance(value, str) and value.strip() else ""
        return f"{Path(path).name} (row {example[ROW]})" if path else f"row {example[ROW]}{text}"


def make_data(
    splits: DatasetDict, inputs: tuple[str, ...], column: str, labels: Labels, args: DataArguments, seed: int
) -> Data:
    """Encode the labels, hold out a validation split if there is none, and draw the requested numbers of examples.

    Raises:
        UserError: a split lacks a column, has missing or unknown labels that are not skipped, or would be empty.
    """
    left_out = RawSplits.of(splits).bad
    splits, notes = _without_unlabeled_test(splits, column)
    encoded, skipped = _encode_splits(splits, inputs, column, labels, args)
    skipped = [*left_out, *skipped]
    encoded, untrained = _without_untrained_classes(encoded, labels, args)
    skipped += untrained
    for name, split in encoded.items():
        if len(split) == 0:
            reason = next(bad.reason for bad in skipped if bad.split == name)
            raise UserError(f"No examples are left in the {name} split: all were skipped (the first one: {reason}).")
    drawn_from = None if "validation" in encoded else "train"
    if drawn_from:
        encoded, note = _hold_out(encoded, labels, args, seed)
        notes.append(note)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for name, limit in limits.items():
        if limit is not None and name in encoded and limit < len(encoded[name]):
            encoded[name] = draw(encoded[name], limit, labels, seed)[1]
    return Data(
        encoded["train"],
        encoded["validation"],
        encoded.get("test"),
        inputs,
        labels,
        tuple(notes),
        tuple(skipped),
        drawn_from,
    )


def _encode_splits(
    splits: DatasetDict, inputs: tuple[str, ...], column: str, labels: Labels, args: DataArguments
) -> tuple[dict[str, Dataset], list[BadExample]]:
    """(splits with the columns `labels` and `ROW`, examples skipped because of their label)."""
    for name, split in splits.items():
        if missing := [c for c in inputs if c not in split.features]:
            raise UserError(
                f"The {name} split has no column {missing[0]!r}, which the training split has.",
                f"Its columns are {', '.join(split.features)}.",
            )
    encoded, skipped = {}, list[BadExample]()
    for name in ("train", "validation", "test"):
        if name in splits:
            split, rows = splits[name], list(range(len(splits[name])))
            if args.on_bad_example == "skip":
                bad = bad_labels(split, name, column, labels)
                skipped += [BadExample(name, f"row {row}", reason) for row, reason in bad.items()]
                rows = [row for row in rows if row not in bad]
                split = split.select(rows) if bad else split
            encoded[name] = encode(split, name, column, labels, "`on_bad_example: skip` leaves such examples out.")
            encoded[name] = encoded[name].add_column(ROW, rows)
    return encoded, skipped


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
            names = ", ".join(repr(labels.names[i]) for i in unseen[:10])
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
    """(the splits with a validation split drawn from the training split, a note about it)."""
    total = len(encoded["train"])
    size = math.ceil(total * args.train_val_split)
    if size >= total:
        raise UserError(
            f"The training split has {total} examples, too few to hold some out for validation.",
            "Provide more examples, or a validation split.",
        )
    rest, held_out, stratified = draw(encoded["train"], size, labels, seed)
    note = (
        f"No validation split: {size} of {total} training examples are held out for validation "
        f"({'stratified' if stratified else 'random'} sample, train_val_split: {args.train_val_split:g}, seed {seed})."
    )
    return encoded | {"train": rest, "validation": held_out}, note


def _without_unlabeled_test(splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """(splits without a test split that has no labels at all, as competitions publish them, notes)."""
    test = splits.get("test")
    if test is None or (column in test.features and len(missing_labels(test, column)) < len(test)):
        return splits, []
    rest = DatasetDict({name: split for name, split in splits.items() if name != "test"})
    return rest, [f"The test split ({len(test):,} examples) has no labels and is left out."]


def draw(split: Dataset, size: int, labels: Labels, seed: int) -> tuple[Dataset, Dataset, bool]:
    """(the rest, a sample of `size` examples, whether it is stratified): by class where the class counts allow it."""
    counts = Counter(split[LABELS][:]) if labels.problem_type == SINGLE_LABEL else Counter()
    stratified = bool(counts) and min(counts.values()) > 1 and len(counts) <= min(size, len(split) - size)
    if not stratified:
        parts = split.train_test_split(test_size=size, seed=seed)
        return parts["train"], parts["test"], False
    features = split.features.copy()
    features[LABELS] = ClassLabel(names=list(labels.names))
    parts = split.cast(features).train_test_split(test_size=size, seed=seed, stratify_by_column=LABELS)
    return parts["train"], parts["test"], True
