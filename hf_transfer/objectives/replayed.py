"""Replay of another task: its own head on the backbone that trains, as a term of the loss (Robins 1995).

The head is not trained, so that the task can still be answered with it: the backbone has to stay one that it can read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hf_transfer.data.labels import LABELS
from hf_transfer.data.replay import EARLIER
from hf_transfer.features.batches import count_of
from hf_transfer.objectives.losses import Loss
from hf_transfer.objectives.objective import ASIDE, Batch, Penalty

NAME = "replay_fraction"


def old_head(head: Mapping[str, torch.Tensor], problem_type: str) -> Penalty:
    """The loss of an old head on the replayed examples of a batch, of which each counts as one of the training set.

    It is their sum over the number of the batch's own examples, of which the loss is the mean; 0 for a batch without
    replayed ones.

    Args:
        head: its parameters, by their names in the model that trains.
        problem_type: of the old task.
    """
    loss = Loss(problem_type)

    def term(module: nn.Module | None, model: nn.Module, batch: Batch, outputs: Any) -> torch.Tensor:
        earlier = batch.get(EARLIER)
        if earlier is None:
            return torch.zeros((), device=next(model.parameters()).device)
        return loss.total(answer(model, head, earlier), earlier[LABELS]) / count_of(batch)

    return Penalty(NAME, lambda step: 1.0, None, term)


def answer(model: nn.Module, head: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Logits of a model with another head in place of its own, for a batch.

    Running statistics of BatchNorm are read and not moved: they are those of the new data, and the old task will be
    answered with them.
    """
    inputs = {name: value for name, value in batch.items() if name not in ASIDE}
    with _kept_statistics(model):
        outputs = functional_call(model, dict(head), (), inputs)
    logits: torch.Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


@contextlib.contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
