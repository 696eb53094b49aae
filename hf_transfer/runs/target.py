"""The target of domain adaptation: read as the source is, with labels only where they are asked for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset, concatenate_datasets

from hf_transfer.config.arguments.adaptation import NONE
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import Chance
from hf_transfer.data.columns import Columns
from hf_transfer.data.examine import without_bad
from hf_transfer.data.images import encoded, undecoded
from hf_transfer.data.labels import LABELS, SINGLE_LABEL, Labels, encode, missing_labels
from hf_transfer.data.load import load_unlabeled
from hf_transfer.data.locate import in_words
from hf_transfer.data.raw import RawSplits
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError, listed, nearest
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task

KEY, LABEL_KEY = "target_dataset_name", "target_label_column_name"
LABELED_SHARE = 0.2  # of the training examples, that are labeled ones of the target
_COMPARED = 256  # examples by which a copy of the source is recognized


@dataclass(frozen=True)
class Target:
    """The target's examples.

    Attributes:
        inputs: names of the input columns.
        examples: these columns, and the examples' rows.
        notes: messages for the user.
        labeled: the examples with a label to train on, with that column; None without `target_label_column_name`.
        column: its name.
    """

    inputs: tuple[str, ...]
    examples: Dataset
    notes: tuple[str, ...]
    labeled: Dataset | None = None
    column: str = ""

    @property
    def count(self) -> int:
        """Of the examples with a label to train on."""
        return 0 if self.labeled is None else len(self.labeled)

    def unseen(self) -> Target:
        """The examples whose labels are not trained on, which a model can be judged by; all if there are none."""
        seen = set() if self.labeled is None else set(self.labeled[ROW][:])
        rest = [i for i, row in enumerate(self.examples[ROW][:]) if row not in seen]
        return replace(self, examples=self.examples.select(rest)) if rest and seen else self

    def plain(self, task: Task, processor: Any, args: DataArguments, most: int | None = None) -> Dataset:
        """The examples as the model takes them, not augmented; at most so many, evenly spread."""
        count = len(self.examples)
        some = self.examples if most is None or count <= most else self.examples.select(spread(count, most))
        return task.prepare(some.remove_columns([ROW]), self.inputs, processor, args)

    def prepared(self, task: Task, processor: Any, args: DataArguments, chance: Chance) -> Dataset:
        """The examples as the model takes them, augmented like the source's."""
        return task.prepare_training(self.examples, self.inputs, processor, args, chance)

    def joined(self, train: Dataset, labels: Labels) -> Dataset:
        """A training split, and after it the labeled examples of the target, if there are any.

        They are repeated until they are `LABELED_SHARE` of the whole, each class equally often; a class that has more
        examples than that has each of them once.

        Args:
            train: with columns of inputs, labels and rows.
            labels: of the run.
        """
        if self.labeled is None:
            return train
        own = encode(self.labeled, "target", self.column, labels)
        wanted = max(len(own), round(len(train) * LABELED_SHARE / (1 - LABELED_SHARE)))
        own = own.select(balanced(own[LABELS][:], wanted))
        first = max(train[ROW][:]) + 1  # each repetition is an example of its own to augmentation
        own = own.remove_columns([ROW]).add_column(ROW, range(first, first + len(own)))
        kept = [*self.inputs, LABELS, ROW]
        train = train.select_columns(kept)
        return concatenate_datasets([train, own.select_columns(kept).cast(train.features)])


def balanced(classes: Sequence[int], count: int) -> list[int]:
    """Numbers of examples, each at least once, such that the classes that there are have equal parts of `count`."""
    members: dict[int, list[int]] = {}
    for number, one in enumerate(classes):
        members.setdefault(one, []).append(number)
    chosen = list[int]()
    for place, one in enumerate(sorted(members)):
        own, part = members[one], count // len(members) + (place < count % len(members))
        chosen += [own[i % len(own)] for i in range(max(part, len(own)))]
    return chosen


def drawn(target: Target | None, config: Config, task: Task, processor: Any, chance: Chance) -> Dataset | None:
    """The target's examples as they are trained on; None where it is only looked at."""
    if target is None or config.training.domain_adaptation == NONE:
        return None
    return target.prepared(task, processor, config.data, chance)


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def read_target(
    config: Config,
    task: Task,
    inputs: tuple[str, ...],
    column: str | Sequence[str],
    labels: Labels,
    source: Dataset,
) -> Target | None:
    """Read the target of a run; None without one.

    Args:
        config: of the run.
        task: of the source.
        inputs: its input columns.
        column: its label columns.
        labels: its labels.
        source: its training split as it was read.

    Raises:
        UserError: the target cannot be read, has no examples or other inputs than the source, or is the source.
    """
    if config.data.target_dataset_name is None:
        return None
    keys = replace(
        config.data,
        dataset_name=config.data.target_dataset_name,
        in_memory=config.data.target_in_memory,
        dataset_config_name=None,
        train_file=None,
        validation_file=None,
        test_file=None,
    )
    with config.training.main_process_first(desc="target"), _about_the_target():
        read = load_unlabeled(keys, labels.names if keys.target_label_column_name else ())
    split = read["train"]
    with _about_the_target():
        split, renamed = _with_inputs(split, read, inputs, task, keys)
        split = split.add_column(ROW, range(len(split)))
        examples = split.select_columns([*inputs, ROW])
        if keys.data_facts or keys.on_bad_example == "skip":
            examples, bad = without_bad(examples, "target", inputs, task.trace, keys, read.bad)
        else:
            bad = list(read.bad)
    if len(split) == len(source) and _contents(split, inputs) == _contents(source, inputs):
        raise UserError(
            "the target has the same examples as the source, so there is nothing to adapt to.",
            "Name the data of the other domain.",
            key=KEY,
        )
    left_out = f", {len(bad):,} unusable ones left out" if bad else ""
    notes = [f"Target: {len(examples):,} examples of {in_words(config.data.target_dataset_name)}{left_out}.", *renamed]
    own = keys.target_label_column_name
    labeled = None if own is None else _labeled(split, own, labels)
    if labeled is not None:
        usable = set(examples[ROW][:])
        labeled = labeled.select([i for i, row in enumerate(labeled[ROW][:]) if row in usable])
        notes.append(_on_labels(labeled, own or "", labels))
        if config.training.domain_adaptation == NONE:
            notes.append("Target: its other examples are not trained on, because domain_adaptation is none.")
    if ignored := [name for name in _label_columns(split, inputs, column) if name != own]:
        notes.append(
            f"Target: {listed(map(repr, ignored))} ignored, because only its inputs are used. For the accuracy on the "
            "target, give labeled examples of it as test_file."
        )
    return Target(inputs, examples, (*notes, *(f"Target: {note}" for note in read.notes)), labeled, own or "")


def _labeled(split: Dataset, column: str, labels: Labels) -> Dataset:
    """The examples with a label.

    Raises:
        UserError: there is no such column, no label in it, or one that the source does not have.
    """
    if labels.problem_type != SINGLE_LABEL:
        raise UserError(
            f"labels of the target are trained on for one class per example, and the source is {labels.problem_type}.",
            "Leave it out.",
            key=LABEL_KEY,
        )
    if column not in split.column_names:
        names = [name for name in split.column_names if name != ROW]
        raise UserError(
            f"the target has no column {column!r}.",
            f"Its columns are {listed(names, 10)}.{nearest(column, names)}",
            key=LABEL_KEY,
        )
    without = set(missing_labels(split, column))
    labeled = split.select([i for i in range(len(split)) if i not in without])
    if not len(labeled):
        raise UserError(f"no example of the target has a label in {column!r}.", "Leave it out.", key=LABEL_KEY)
    try:
        encode(labeled, "target", column, labels)
    except UserError as error:
        raise UserError(error.problem, error.fix, key=LABEL_KEY) from error
    return labeled


def _on_labels(labeled: Dataset, column: str, labels: Labels) -> str:
    counts = Counter(encode(labeled, "target", column, labels)[LABELS][:])
    classes = len(counts)
    few = f"{min(counts.values())} to {max(counts.values())}" if len(set(counts.values())) > 1 else min(counts.values())
    missing = "" if classes == len(labels) else f"; {len(labels) - classes} of the classes have none"
    return (
        f"Target: {len(labeled):,} labeled examples are trained on, {few} of each of {classes} classes{missing}. They "
        f"are repeated until they are {LABELED_SHARE:.0%} of the training examples, each class equally often."
    )


@contextlib.contextmanager
def _about_the_target() -> Iterator[None]:
    """Context in which errors name the target's key in place of the source's."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the target: {error.problem}", error.fix, key=KEY) from error


def _with_inputs(
    split: Dataset, read: RawSplits, inputs: tuple[str, ...], task: Task, keys: DataArguments
) -> tuple[Dataset, list[str]]:
    """(the target with the source's names of inputs, what was renamed).

    A single input that has another name is the only column that can be one.

    Raises:
        UserError: it lacks inputs, or they are of another kind.
    """
    columns, notes = Columns(split, read.written, list(inputs)), list[str]()
    unnamed = replace(keys, text_column_name=None, image_column_name=None, label_column_name=None)
    if missing := [name for name in inputs if name not in split.column_names]:
        found = task.input_columns(columns, unnamed)
        if len(inputs) > 1 or len(found) != 1:
            raise UserError(
                f"it has no column {listed(map(repr, missing))}, which the source has ({task.name}).",
                f"Its columns are {listed(split.column_names, 10)}.",
            )
        split = split.rename_column(found[0], inputs[0])
        columns = Columns(split, read.written, list(inputs))
        notes.append(f"Target: its column {found[0]!r} is read as {inputs[0]!r} of the source.")
    named: dict[str, Any] = {task.input_key: list(inputs) if len(inputs) > 1 else inputs[0]} if task.input_key else {}
    task.input_columns(columns, replace(unnamed, **named))
    return split, notes


def _label_columns(split: Dataset, inputs: Sequence[str], labels: str | Sequence[str]) -> list[str]:
    named = {labels} if isinstance(labels, str) else set(labels)
    return [n for n, f in split.features.items() if n not in inputs and (n in named or isinstance(f, ClassLabel))]


def _contents(split: Dataset, inputs: Sequence[str]) -> set[tuple[Any, ...]]:
    """The inputs of the first examples, of an image its bytes."""
    rows = undecoded(split.select(range(min(len(split), _COMPARED))), inputs)
    return {tuple(_content(row[name]) for name in inputs) for row in rows}


def _content(cell: Any) -> Any:
    if not isinstance(cell, dict):
        return cell
    try:
        return encoded(cell)
    except ValueError:  # reported where it is to be used
        return str(cell.get("path"))
