"""The tasks. A new one is a class that follows `base.Task`, and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.errors import UserError
from hf_transfer.tasks.base import Task
from hf_transfer.tasks.image_classification import ImageClassification
from hf_transfer.tasks.text_classification import TextClassification

TASKS: dict[str, Task] = {
    "image-classification": ImageClassification(),
    "text-classification": TextClassification(),
}


def choose_task(features: Mapping[str, Any], args: DataArguments) -> tuple[Task, tuple[str, ...]]:
    """(the task, its input columns): the one that `task` names, else the only one that recognises the columns.

    Raises:
        UserError: the data does not show which one is meant.
    """
    if args.task is not None:
        task = TASKS[args.task]
        columns = task.input_columns(features, args)
        if not columns:
            raise UserError(
                f"task: the data has no input column for {args.task}.", f"Its columns are {', '.join(features)}."
            )
        return task, columns
    found = {name: columns for name, task in TASKS.items() if (columns := task.input_columns(features, args))}
    if len(found) > 1 and "image-classification" in found:  # captions and file names beside an image
        found = {"image-classification": found["image-classification"]}
    if len(found) != 1:
        raise UserError(
            f"task: the columns {', '.join(features)} do not show which task this is.",
            f"Set task to one of {', '.join(TASKS)}, and name the input column.",
        )
    name, columns = next(iter(found.items()))
    return TASKS[name], columns


def task_of(config: Any, name: str) -> str:
    """The task that a saved model was made for, by its class.

    Raises:
        UserError: it is of no known task.
    """
    found = []
    for task in TASKS.values():
        mapping = getattr(transformers, task.auto_class)._model_mapping if task.auto_class else {}
        if type(config) in mapping:
            classes = mapping[type(config)]
            names = {c.__name__ for c in (classes if isinstance(classes, list | tuple) else [classes])}
            found += [task.name] if names & set(config.architectures or ()) else []
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"RUN: {name!r} holds {', '.join(config.architectures or ('a ' + config.model_type + ' model',))}, which is of "
        f"none of the tasks {', '.join(TASKS)}.",
        "Train a head on it with `hf-transfer train`.",
    )


def task_of_kind(config: Any) -> str:
    """The task that a kind of model can be trained for.

    Raises:
        UserError: there is none, or more than one.
    """
    found = [
        task.name
        for task in TASKS.values()
        if task.auto_class and type(config) in getattr(transformers, task.auto_class)._model_mapping
    ]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"task: a {config.model_type} model does not show which task this is.",
        f"Set task to one of {', '.join(TASKS)}.",
    )
