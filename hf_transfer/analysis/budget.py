"""Memory that training takes on one device, by stage: parameters, gradients and optimizer states are exact.

Activations are an estimate: what autograd saves in the forward pass of a few real examples, scaled to the batch. Not
counted are workspaces of single operations, gradients of activations, gradient buckets of data parallelism, and what a
library keeps; `OVERHEAD` stands for these where it is decided what fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

OVERHEAD = 1_000_000_000  # bytes: CUDA's context, workspaces, fragmentation
# What an optimizer may raise on parameters without memory, or a library that is not there: its states are then unknown,
# and the budget says so. Whether the optimizer works at all is for the preflight, which makes it on the real ones.
_REFUSALS = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, AssertionError, ImportError)


@dataclass(frozen=True)
class Activations:
    """What autograd saves for the backward pass.

    Attributes:
        fixed: bytes, whatever the batch: weights that autocast has rounded, tables of positions.
        per_example: bytes for each example of a batch.
    """

    fixed: int
    per_example: int

    def of_batch(self, examples: int) -> int:
        return self.fixed + self.per_example * examples


@dataclass(frozen=True)
class StageMemory:
    """What one stage takes on a device, in bytes.

    Attributes:
        stage: its name.
        parameters: of the whole model, adapters included.
        adapter: of these, parameters of the adapter; 0 without one.
        buffers: of the model.
        gradients: of what trains and the loss reaches.
        optimizer: states of what has trained up to the end of the stage; None where the optimizer's are not known.
        activations: None where they are not known.
        batch: examples in a batch on the device.
        boundary_cache: what the boundary cache keeps, in memory of the host or on disk; 0 where it is off.
    """

    stage: str
    parameters: int
    adapter: int
    buffers: int
    gradients: int
    optimizer: int | None
    activations: Activations | None
    batch: int
    boundary_cache: int = 0

    @property
    def without_activations(self) -> int:
        """What does not depend on the batch and is exact, as far as it is known."""
        return self.parameters + self.buffers + self.gradients + (self.optimizer or 0)

    def total(self, batch: int | None = None) -> int:
        """What is known of a batch of this size; None: of the batch that was asked for."""
        size = self.batch if batch is None else batch
        return self.without_activations + (self.activations.of_batch(size) if self.activations else 0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "parameters_bytes": self.parameters,
            "adapter_bytes": self.adapter,
            "buffers_bytes": self.buffers,
            "gradients_bytes": self.gradients,
            "optimizer_bytes": self.optimizer,
            "activations_bytes": self.activations.of_batch(self.batch) if self.activations else None,
            "activations_bytes_per_example": self.activations.per_example if self.activations else None,
            "total_bytes": self.total(),
            "boundary_cache_bytes": self.boundary_cache,
        }


@dataclass(frozen=True)
class Trained:
    """What trains in a stage.

    Attributes:
        stage: its name.
        parameters: names of those that get a gradient.
        activations: None where they are not known.
        boundary_cache: bytes that the boundary cache keeps.
    """

    stage: str
    parameters: Collection[str]
    activations: Activations | None = None
    boundary_cache: int = 0


def memory_of(
    model: nn.Module,
    stages: Sequence[Trained],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    batch: int,
    adapter: Collection[str] = (),
) -> list[StageMemory]:
    """What each stage takes; the model is only looked at, and may be on the meta device.

    Args:
        model: with its adapter.
        stages: in order.
        optimizer: makes one of a list of parameters.
        batch: examples in a batch on a device.
        adapter: names of the adapter's parameters.
    """
    parameters = dict(model.named_parameters())
    sizes = {name: nbytes(p) for name, p in parameters.items()}
    buffers = sum(nbytes(buffer) for buffer in model.buffers())
    ever = {name for stage in stages for name in stage.parameters}
    states = state_bytes([parameters[name] for name in parameters if name in ever], optimizer)
    memory, so_far = [], set[str]()
    for stage in stages:
        so_far |= set(stage.parameters)
        kept = None if states is None else sum(states[_form(parameters[name])] for name in so_far)
        memory.append(
            StageMemory(
                stage.stage,
                parameters=sum(sizes.values()),
                adapter=sum(sizes[name] for name in adapter),
                buffers=buffers,
                gradients=sum(sizes[name] for name in stage.parameters),
                optimizer=kept,
                activations=stage.activations,
                batch=batch,
                boundary_cache=stage.boundary_cache,
            )
        )
    return memory


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


Form = tuple[torch.Size, torch.dtype]


def _form(parameter: torch.Tensor) -> Form:
    return parameter.shape, parameter.dtype


def state_bytes(
    parameters: Iterable[torch.Tensor], make: Callable[[Any], torch.optim.Optimizer]
) -> dict[Form, int] | None:
    """Bytes of the state that an optimizer keeps for a parameter, by its shape and dtype.

    The optimizer takes a step on the meta device, so this is no table of optimizers: Adafactor factors matrices, and
    SGD without momentum keeps nothing.

    Args:
        parameters: whose shapes and dtypes are asked for.
        make: makes an optimizer of a list of parameters.

    Returns:
        None if the optimizer cannot take a step without data, as those with 8-bit states.
    """
    forms = list(Counter(_form(p) for p in parameters))
    try:
        stand_ins = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in forms]
        if not stand_ins:
            return {}
        optimizer = make(stand_ins)
        for stand_in in stand_ins:
            stand_in.grad = torch.empty_like(stand_in)
        optimizer.step()
        return {form: _kept(optimizer.state[p]) for form, p in zip(forms, stand_ins, strict=True)}
    except _REFUSALS:
        return None


def _kept(state: Any) -> int:
    return sum(nbytes(leaf) for leaf in pytree.tree_leaves(dict(state)) if torch.is_tensor(leaf))


def without_kernels(options: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's options without the choice of a kernel, which needs a device and changes no size."""
    return {name: value for name, value in options.items() if name not in ("fused", "foreach")}
