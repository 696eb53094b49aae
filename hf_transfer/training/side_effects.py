"""Forward passes that leave no trace in the model or the random number generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """A forward pass in this context leaves buffers and random number generators as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """As `without_side_effects`; each module's train or eval mode is restored as well."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with without_side_effects(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
