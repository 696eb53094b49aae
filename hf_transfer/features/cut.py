"""Where a model is entered in a replay: which outputs of which modules are recorded, and in which shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

CallKey = tuple[str, int]  # a module's name, and which of its calls in a forward pass


class Refused(Exception):
    """The frozen part cannot be replayed exactly; the message is the reason, as part of a sentence."""


@dataclass(frozen=True)
class Dimension:
    """The size of a tensor's dimension as a function of the batch.

    Attributes:
        constant: size for any batch.
        per_example: size per example of the batch.
        per_position: size per token position of the batch.
    """

    constant: int = 0
    per_example: int = 0
    per_position: int = 0

    def size(self, rows: int, length: int) -> int:
        """For a batch of `rows` examples with `length` positions."""
        return self.constant + self.per_example * rows + self.per_position * length


@dataclass(frozen=True)
class Leaf:
    """One tensor among the outputs of a module call.

    Attributes:
        dimensions: its shape for any batch.
        dtype: that it is computed in.
        stored: whether it must be recorded. If not, nothing trainable depends on it, or it is `constant`.
        first_only: whether only the first position of the dimension after the examples is needed (a class token).
        constant: its value, if that is the same for every batch.
    """

    dimensions: tuple[Dimension, ...]
    dtype: torch.dtype
    stored: bool = False
    first_only: bool = False
    constant: torch.Tensor | None = None

    @property
    def _batch(self) -> int:
        return next(i for i, d in enumerate(self.dimensions) if d.per_example)

    @property
    def _length(self) -> int | None:
        return next((i for i, d in enumerate(self.dimensions) if d.per_position), None)

    @property
    def ragged(self) -> bool:
        """Whether an example has one row per position of its text."""
        return self._length is not None and not self.first_only

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example; of one position of an example if the leaf is ragged."""
        rest = [d.constant for i, d in enumerate(self.dimensions) if i not in (self._batch, self._length)]
        repeats = self.dimensions[self._batch].per_example
        shape = ([repeats] if repeats > 1 else []) + rest
        return tuple(shape[1:] if self.first_only and self._length is None else shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one example; of one position of an example if the leaf is ragged."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """The output of a call, one row per example: (examples, [positions,] *shape)."""
        repeats, order = self.dimensions[self._batch].per_example, [self._batch]
        order += [] if self._length is None else [self._length]
        value = value.permute(*order, *(i for i in range(value.dim()) if i not in order))
        if repeats > 1:
            value = value.reshape(-1, repeats, *value.shape[1:])
            value = value.transpose(1, 2) if self._length is not None else value
        return value[:, 0] if self.first_only else value

    def output(self, rows: torch.Tensor, count: int, length: int) -> torch.Tensor:
        """The output of a call from its rows: the inverse of `rows`, with zeros where only the first position is kept.

        Args:
            rows: (examples, [positions,] *shape).
            count: number of examples.
            length: token positions of the batch.
        """
        if self.first_only:
            size = length if self._length is not None else self.dimensions[1].constant
            whole = rows.new_zeros((count, size, *rows.shape[1:]))
            whole[:, 0] = rows
            rows = whole
        repeats, order = self.dimensions[self._batch].per_example, [self._batch]
        order += [] if self._length is None else [self._length]
        if repeats > 1:
            rows = rows.transpose(1, 2) if self._length is not None else rows
            rows = rows.reshape(-1, *rows.shape[2:])
        order += [i for i in range(len(self.dimensions)) if i not in order]
        return rows.permute(*(order.index(i) for i in range(len(order))))

    def placeholder(self, count: int, length: int, device: torch.device, allocates: bool) -> torch.Tensor:
        """Zeros of the right shape, for an output that nothing trainable depends on.

        Args:
            count: number of examples.
            length: token positions of the batch.
            device: of the model.
            allocates: whether to allocate every element, for a model that writes into the output in place.
        """
        shape = [d.size(count, length) for d in self.dimensions]
        if allocates:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        return torch.zeros((), dtype=self.dtype, device=device).expand(shape)


@dataclass(frozen=True)
class Call:
    """The output of one module call.

    Attributes:
        spec: its structure, as a pytree.
        leaves: tensors (`Leaf`) and other values, in the order of `spec`.
    """

    spec: Any
    leaves: tuple[Any, ...]

    @property
    def is_stored(self) -> bool:
        """Whether any of its tensors is recorded."""
        return any(isinstance(leaf, Leaf) and leaf.stored for leaf in self.leaves)


@dataclass(frozen=True)
class Cut:
    """Where a model is entered in a replay.

    Attributes:
        calls: every module call that a stand-in answers.
        reads: names of the floating-point inputs that the trainable part reads directly.
        allocates: whether outputs that nothing trainable depends on need memory of their own.
    """

    calls: Mapping[CallKey, Call]
    reads: frozenset[str]
    allocates: bool = False

    @property
    def stored(self) -> dict[str, tuple[CallKey, int, Leaf]]:
        """{name of a recorded tensor: (call, index among its outputs, leaf)}."""
        return {
            f"{name}#{index}/{i}": ((name, index), i, leaf)
            for (name, index), call in self.calls.items()
            for i, leaf in enumerate(call.leaves)
            if isinstance(leaf, Leaf) and leaf.stored
        }

    def nbytes(self, length: int) -> int:
        """Bytes of one example with `length` positions."""
        return sum(leaf.nbytes * (length if leaf.ragged else 1) for _, _, leaf in self.stored.values())

    @property
    def where(self) -> str:
        """The modules whose outputs are recorded, for display."""
        return ", ".join(dict.fromkeys(key[0] for key, _, _ in self.stored.values()))
