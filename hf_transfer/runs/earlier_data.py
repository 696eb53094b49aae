"""Read the train split of other data as a run reads its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.columns import Columns, as_shown
from hf_transfer.data.examine import without_bad
from hf_transfer.data.label_columns import find_labels
from hf_transfer.data.labels import Labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.locate import locate
from hf_transfer.data.splits import encode_split
from hf_transfer.errors import UserError, named
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task


def _source_keys(keys: DataArguments, name: str, labels: Labels) -> DataArguments:
    """The keys that read the train split of other data as the run reads its own; columns are inferred again."""
    return replace(
        keys,
        dataset_name=name,
        dataset_config_name=None,
        train_file=None,
        validation_file=None,
        test_file=None,
        in_memory=None,
        max_train_samples=None,
        split_group_column_name=None,
        problem_type=labels.problem_type,
    )


def read_examples(
    config: Config, task: Task, name: str, labels: Labels, key: str
) -> tuple[Dataset, tuple[str, ...], DataArguments]:
    """(the train split with encoded labels, its input columns, the keys that read it).

    Raises:
        UserError: there is no such data, or its labels are not among `labels`.
    """
    keys = _source_keys(config.data, name, labels)
    try:
        with config.training.main_process_first(desc=key):
            source = locate(keys)
            splits = load_splits(keys, source)
        splits = splits.but({"train": splits["train"]})
        features = splits["train"].features
        absent: dict[str, Any] = {k: None for k in _column_keys(task) if not _has(features, getattr(keys, k))}
        keys = replace(keys, **absent)
        columns = Columns(splits["train"], splits.written, keys.text_column_name)
        inputs = task.input_columns(columns, keys)
        if not inputs:
            raise UserError(f"the data has no input column for {task.name}: it has {named(features, 6)}.")
        splits = as_shown(splits, columns, inputs, keys.on_bad_example == "skip")
        found = find_labels(splits, inputs, keys, labels)
        rows, skipped = encode_split(found.splits["train"], "train", found.name, labels, keys)
        if keys.on_bad_example == "skip":
            rows, _ = without_bad(rows, "train", inputs, task.trace, keys, [*found.splits.bad, *skipped])
    except UserError as error:
        problem = error.problem.removeprefix("dataset_name: ").replace(
            "The train split", f"The train split of {name!r}"
        )
        raise type(error)(problem, error.fix.replace("dataset_name", key), key) from error
    return rows, inputs, keys


def _column_keys(task: Task) -> tuple[str, ...]:
    return (*((task.input_key,) if task.input_key else ()), "label_column_name")


def _has(features: Any, given: str | list[str] | None) -> bool:
    return given is not None and all(name in features for name in ([given] if isinstance(given, str) else given))
