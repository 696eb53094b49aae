"""The target of domain adaptation: read as the source is, without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset

from hf_transfer.config.arguments.adaptation import NONE
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.augment import Chance
from hf_transfer.data.columns import Columns
from hf_transfer.data.examine import without_bad
from hf_transfer.data.images import encoded, undecoded
from hf_transfer.data.load import load_unlabeled
from hf_transfer.data.locate import in_words
from hf_transfer.data.raw import RawSplits
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError, listed
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task

KEY = "target_dataset_name"
_COMPARED = 256  # examples by which a copy of the source is recognized


@dataclass(frozen=True)
class Target:
    """The target's examples.

    Attributes:
        inputs: names of the input columns.
        examples: these columns, and the examples' rows.
        notes: messages for the user.
    """

    inputs: tuple[str, ...]
    examples: Dataset
    notes: tuple[str, ...]

    def plain(self, task: Task, processor: Any, args: DataArguments, most: int | None = None) -> Dataset:
        """The examples as the model takes them, not augmented; at most so many, evenly spread."""
        count = len(self.examples)
        some = self.examples if most is None or count <= most else self.examples.select(spread(count, most))
        return task.prepare(some.remove_columns([ROW]), self.inputs, processor, args)

    def prepared(self, task: Task, processor: Any, args: DataArguments, chance: Chance) -> Dataset:
        """The examples as the model takes them, augmented like the source's."""
        return task.prepare_training(self.examples, self.inputs, processor, args, chance)


def drawn(target: Target | None, config: Config, task: Task, processor: Any, chance: Chance) -> Dataset | None:
    """The target's examples as they are trained on; None where it is only looked at."""
    if target is None or config.training.domain_adaptation == NONE:
        return None
    return target.prepared(task, processor, config.data, chance)


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def read_target(
    config: Config, task: Task, inputs: tuple[str, ...], labels: str | Sequence[str], source: Dataset
) -> Target | None:
    """Read the target of a run; None without one.

    Args:
        config: of the run.
        task: of the source.
        inputs: its input columns.
        labels: its label columns.
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
        read = load_unlabeled(keys)
    split = read["train"]
    with _about_the_target():
        split, renamed = _with_inputs(split, read, inputs, task, keys)
        examples = split.select_columns(list(inputs)).add_column(ROW, range(len(split)))
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
    if ignored := _label_columns(split, inputs, labels):
        notes.append(
            f"Target: {listed(map(repr, ignored))} ignored, because only its inputs are used. For the accuracy on the "
            "target, give labeled examples of it as test_file."
        )
    return Target(inputs, examples, (*notes, *(f"Target: {note}" for note in read.notes)))


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
