"""From raw splits to the splits of a run: labels encoded, a validation split made, numbers of examples drawn."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, DatasetDict

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.labels import LABELS, SINGLE_LABEL, Labels, bad_labels, encode, missing_labels
from hf_transfer.errors import UserError

ROW = "__row__"  # an example's row in the data as it was given


@dataclass(frozen=True)
class BadExample:
    """An example that is left out.

    Attributes:
        split: the split it is of.
        example: its row, or the name of its file.
        reason: what is wrong with it.
    """

    split: str
    example: str
    reason: str


@dataclass(frozen=True)
class Data:
    """Splits ready for a task: the input columns as they came, and `labels` encoded.

    Attributes:
        train, validation, test: the splits; `test` is None where the data has none.
        inputs: the input columns.
        labels: problem type and class names.
        notes: sentences for the user.
        skipped: what was left out under `on_bad_example: skip`.
        drawn_from: the split that validation was drawn from, where it was.
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
        """The split of the data as it was given that the examples of a split come from."""
        return (self.drawn_from or name) if name == "validation" else name


def make_data(
    splits: DatasetDict, inputs: tuple[str, ...], column: str, labels: Labels, args: DataArguments, seed: int
) -> Data:
    """Encode the labels, make a validation split where there is none, and draw the numbers of examples asked for.

    Raises:
        UserError: a split lacks a column, or holds labels that are missing or not learnt, unless they are skipped.
    """
    splits, notes = _without_secret_test(splits, column)
    for name, split in splits.items():
        if missing := [c for c in inputs if c not in split.features]:
            raise UserError(
                f"The {name} split has no column {missing[0]!r}, which the training split has.",
                f"It has {', '.join(split.features)}.",
            )
    encoded, skipped = {}, list[BadExample]()
    for name in ("train", "validation", "test"):
        if name in splits:
            split, rows = splits[name], list(range(len(splits[name])))
            if args.on_bad_example == "skip":
                bad = bad_labels(split, name, column, labels)
                skipped += [BadExample(name, f"row {row}", why) for row, why in bad.items()]
                rows = [row for row in rows if row not in bad]
                split = split.select(rows) if bad else split
            encoded[name] = encode(split, name, column, labels, "`on_bad_example: skip` leaves such examples out.")
            encoded[name] = encoded[name].add_column(ROW, rows)
    encoded, more = _with_learnt_labels(encoded, labels, args)
    skipped += more
    for name, split in encoded.items():
        if len(split) == 0:
            raise UserError(
                f"No example of the {name} split is left: all were skipped, the first because {_why(skipped, name)}."
            )
    drawn_from = None if "validation" in encoded else "train"
    if drawn_from:
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


def _why(skipped: list[BadExample], name: str) -> str:
    return next(bad.reason for bad in skipped if bad.split == name)


def _with_learnt_labels(
    encoded: dict[str, Dataset], labels: Labels, args: DataArguments
) -> tuple[dict[str, Dataset], list[BadExample]]:
    """(the splits, what was left out): held-out examples whose class is declared but has no training example.

    Raises:
        UserError: there are such examples, and they are not skipped.
    """
    if labels.problem_type != SINGLE_LABEL:
        return encoded, []
    learnt, skipped = set(encoded["train"][LABELS][:]), list[BadExample]()
    for name, split in encoded.items():
        values = split[LABELS][:]
        unseen = sorted(set(values) - learnt)
        if unseen:
            names = ", ".join(repr(labels.names[i]) for i in unseen[:10])
            if args.on_bad_example != "skip":
                raise UserError(
                    f"The {name} split has examples of {names}, of which the training split has none.",
                    "Give training examples of them, or leave these out with on_bad_example: skip.",
                )
            bad = {i: labels.names[v] for i, v in enumerate(values) if v not in learnt}
            rows = split[ROW][:]
            skipped += [BadExample(name, f"row {rows[i]}", f"its label {v!r} is not learnt") for i, v in bad.items()]
            encoded[name] = split.select([i for i in range(len(split)) if i not in bad])
    return encoded, skipped


def _without_secret_test(splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """(the splits, notes) without a test split of which no example has a label, as benchmarks publish them."""
    test = splits.get("test")
    if test is None or column not in test.features or len(missing_labels(test, column)) < len(test):
        return splits, []
    rest = DatasetDict({name: split for name, split in splits.items() if name != "test"})
    return rest, ["The test split has no labels, so it is left out."]


def draw(split: Dataset, size: int, labels: Labels, seed: int) -> tuple[Dataset, Dataset, bool]:
    """(the rest, `size` examples, whether each class is there in proportion): by class where that can be done."""
    counts = Counter(split[LABELS][:]) if labels.problem_type == SINGLE_LABEL else Counter()
    by_class = bool(counts) and min(counts.values()) > 1 and len(counts) <= min(size, len(split) - size)
    if not by_class:
        parts = split.train_test_split(test_size=size, seed=seed)
        return parts["train"], parts["test"], False
    features = split.features.copy()
    features[LABELS] = ClassLabel(names=list(labels.names))
    parts = split.cast(features).train_test_split(test_size=size, seed=seed, stratify_by_column=LABELS)
    return parts["train"], parts["test"], True
