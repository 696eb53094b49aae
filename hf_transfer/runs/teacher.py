"""The teacher of a run with `teacher_model_name_or_path`: a trained model with its labels, which reads its inputs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hf_transfer.config.arguments.model import MAIN, ModelArguments
from hf_transfer.data.labels import Labels
from hf_transfer.data.splits import Data
from hf_transfer.errors import UserError, listed, named
from hf_transfer.models.load import Loaded
from hf_transfer.models.source import read_config
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task

_KEY = "teacher_model_name_or_path"
_TRAINED = "Use a model that was trained on these labels."
_COMPARED = 16  # examples that both tokenizers or image processors read


def as_saved(args: ModelArguments, name: str | None = None) -> ModelArguments:
    """Keys that load a model as it was saved."""
    own: dict[str, Any] = (
        {} if name is None else {"model_name_or_path": name, "model_revision": MAIN, "layer_rules": None}
    )
    own_head: dict[str, Any] = dict.fromkeys(
        ("head", "head_hidden_size", "head_dropout", "head_norm", "pooling", "pooling_layer")
    )
    return replace(args, from_scratch=False, restart_adapter=False, **own_head, **own)


def load_teacher(
    config: Config, task: Task, data: Data, labels: Labels, processor: Any
) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """(the teacher, the order of its outputs by the run's labels).

    Raises:
        UserError: it has other labels, or reads other inputs.
    """
    name = config.training.teacher_model_name_or_path
    assert name is not None
    keys = as_saved(config.model, name)
    try:
        its_config = read_config(keys)
        own = Labels.of(its_config)
        is_same = labels.generic(its_config) or sorted(own.names) == sorted(labels.names)
        # The labels of a model without a head are transformers' defaults, which nobody chose.
        if bare := [one for one in its_config.architectures or () if one.endswith("Model")]:
            raise UserError(f"{name!r} holds no trained head: it contains {bare[0]}.", _TRAINED)
        if not is_same or own.problem_type != labels.problem_type:
            raise UserError(
                f"the teacher predicts {named(own.names, 4)} ({own.problem_type}), and this run "
                f"{named(labels.names, 4)} ({labels.problem_type}).",
                "Use a teacher with the labels of this run; without one, distillation_alpha holds the features of the "
                "pretrained model.",
            )
        loaded, its_processor = task.load(keys, config.data, labels)
        if loaded.fresh:
            raise UserError(
                f"{name!r} holds no trained head ({listed(loaded.fresh, 2)} would be random).",
                _TRAINED,
            )
        _check_inputs(task, data, loaded, processor, its_processor)
    except UserError as error:
        raise type(error)(error.problem, error.fix.replace("model_name_or_path", _KEY), _KEY) from error
    names = list(loaded.labels.names)
    return loaded.model, tuple(names.index(label) for label in labels.names)


def _check_inputs(task: Task, data: Data, loaded: Loaded, processor: Any, its_processor: Any) -> None:
    """Raises:
    UserError: the teacher reads an example in another way than the run's model.
    """
    limit, its_limit = (getattr(p, "model_max_length", None) for p in (processor, its_processor))
    if limit is not None and its_limit is not None and its_limit < limit:
        raise UserError(
            f"the teacher reads at most {its_limit} tokens, and this run {limit}.", f"Set max_seq_length: {its_limit}."
        )
    sample = data.train.select(range(min(_COMPARED, len(data.train))))
    columns = [[task.read(value) for value in sample[column][:]] for column in data.inputs]
    ours, theirs = task.encode(columns, processor), task.encode(columns, its_processor)
    accepted = inspect.signature(loaded.model.forward).parameters
    for name in (n for n in theirs if n in accepted):
        if name not in ours or not _equal(ours[name], theirs[name]):
            kind = "tokenizer" if limit is not None else "image preprocessing"
            raise UserError(
                f"the teacher has another {kind} than this run's model ({name} of the same examples differ).",
                "Use a teacher with the same one, such as a model trained from the same checkpoint.",
            )


def _equal(one: Any, other: Any) -> bool:
    if torch.is_tensor(one) or isinstance(one, np.ndarray):
        return bool(np.shape(one) == np.shape(other) and np.allclose(one, other))
    pairs = zip(one, other, strict=True)
    return len(one) == len(other) and all(np.shape(a) == np.shape(b) and np.allclose(a, b) for a, b in pairs)
