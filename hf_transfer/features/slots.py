"""What a store holds of every example: names, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """A tensor that every example has.

    Attributes:
        name: of the tensor.
        shape: of one example, without the ragged dimension.
        dtype: of the tensors that are put.
        ragged: whether an example has `length` rows of `shape`, or one.
        kept: dtype of the stored tensors: `dtype`, or a smaller one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ragged: bool
    kept: torch.dtype

    def tensor_shape(self, lengths: Sequence[int] | None, rows: int) -> tuple[int, ...]:
        """Shape of all examples together: (sum of lengths or rows, *shape).

        Raises:
            ValueError: the slot is ragged, and there are no lengths.
        """
        if self.ragged and lengths is None:
            raise ValueError(f"slot {self.name} is ragged and needs lengths")
        return (sum(lengths) if self.ragged and lengths is not None else rows, *self.shape)

    def nbytes(self, lengths: Sequence[int] | None, rows: int) -> int:
        """Bytes of all examples together."""
        return math.prod(self.tensor_shape(lengths, rows)) * self.kept.itemsize


def nbytes(slots: Sequence[Slot], lengths: Sequence[int] | None, rows: int) -> int:
    """Bytes of a store with these slots."""
    return sum(slot.nbytes(lengths, rows) for slot in slots)
