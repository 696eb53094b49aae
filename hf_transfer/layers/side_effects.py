"""Forward passes that leave no trace in the model or the random number generators."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextlib.contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """A forward pass in this context leaves buffers and random number generators as they were, also if it fails."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """As `without_side_effects`; the attributes of each module are restored as well.

    These are its train or eval mode, its hooks, and what it keeps between forward passes: LeViT a table of biases,
    Llama with dynamic RoPE the longest text so far and the frequencies that follow from it.
    """
    attributes = [(module, _snapshot(vars(module))) for module in model.modules()]
    try:
        with without_side_effects(model):
            yield
    finally:
        for module, before in attributes:
            _restore(vars(module), before)


def _snapshot(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (value, its content if it is a container)}"""
    return {n: (v, v.copy() if type(v) in _CONTAINERS else None) for n, v in attributes.items()}


def _restore(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in attributes.keys() - before.keys():
        del attributes[name]
    for name, (value, content) in before.items():
        attributes[name] = value
        if type(value) is list:
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)
