"""The tasks. A new task is a subclass of `base.Task` and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.scope import refuse_out_of_scope
from hf_transfer.errors import UserError
from hf_transfer.tasks.base import Task
from hf_transfer.tasks.image_classification import ImageClassification
from hf_transfer.tasks.text_classification import TextClassification

TASKS: dict[str, Task] = {
    "image-classification": ImageClassification(),
    "text-classification": TextClassification(),
}


def choose_task(features: Mapping[str, Any], args: DataArguments) -> tuple[Task, tuple[str, ...]]:
    """(the task, its input columns): the task named by `task`, else the only one that recognizes the columns.

    Raises:
        UserError: no task or several tasks recognize the columns, or they are those of a task that is out of scope.
    """
    if args.label_column_name is None:
        refuse_out_of_scope(features)
    if args.task is not None:
        task = TASKS[args.task]
        columns = task.input_columns(features, args)
        if not columns:
            raise UserError(
                f"task: the data has no input column for {args.task}.", f"Its columns are {', '.join(features)}."
            )
        return task, columns
    candidates = {name: columns for name, task in TASKS.items() if (columns := task.input_columns(features, args))}
    if len(candidates) > 1 and "image-classification" in candidates:  # text next to images is captions or file names
        candidates = {"image-classification": candidates["image-classification"]}
    if len(candidates) != 1:
        raise UserError(
            f"task: cannot infer the task from the columns {', '.join(features)}.",
            f"Set task to one of {', '.join(TASKS)}, and name the input column.",
        )
    name, columns = next(iter(candidates.items()))
    return TASKS[name], columns


def task_of(config: Any, name: str) -> str:
    """The task of a saved model, inferred from its class.

    Raises:
        UserError: the model belongs to none of the tasks.
    """
    matching = []
    for task in TASKS.values():
        mapping = getattr(transformers, task.auto_class)._model_mapping if task.auto_class else {}
        if type(config) in mapping:
            classes = mapping[type(config)]
            names = {c.__name__ for c in (classes if isinstance(classes, list | tuple) else [classes])}
            matching += [task.name] if names & set(config.architectures or ()) else []
    if len(matching) == 1:
        return matching[0]
    raise UserError(
        f"RUN: {name!r} holds no head for {' or '.join(TASKS)}: it contains "
        f"{', '.join(config.architectures or ('a ' + config.model_type + ' model',))}.",
        "Train a head for it with `hf-transfer train`.",
    )


def task_of_kind(config: Any) -> str:
    """The only task that models of this architecture can be trained for.

    Raises:
        UserError: there is none, or more than one.
    """
    matching = [
        task.name
        for task in TASKS.values()
        if task.auto_class and type(config) in getattr(transformers, task.auto_class)._model_mapping
    ]
    if len(matching) == 1:
        return matching[0]
    raise UserError(
        f"task: cannot infer the task from a {config.model_type} model.",
        f"Set task to one of {', '.join(TASKS)}.",
    )
