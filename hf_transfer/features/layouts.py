"""Which axis of a layer's output is what, and how the output is pooled over its positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

CLS, MEAN, MAX = "cls", "mean", "max"
POOLINGS = (CLS, MEAN, MAX)
HEAD_INPUT = "input"  # the vector that the head reads: no pooling


@dataclass(frozen=True)
class Layout:
    """The axes of the output of a layer group.

    Attributes:
        batch: axis of the examples.
        channel: axis of the features.
        width: number of features.
        is_text: whether the positions are those of the tokens.
        skipped: positions that are no patches of the image (class and register tokens), which `mean` and `max` leave
            out. A text's class token is a token like others.
    """

    batch: int
    channel: int
    width: int
    is_text: bool
    skipped: tuple[int, ...] = ()

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """(examples, positions, width), at least in fp32, of an output: tokens, patches or pixels in any order."""
        positions = [i for i in range(value.dim()) if i not in (self.batch, self.channel)]
        value = value.permute(self.batch, *positions, self.channel)
        return _at_least_fp32(value.reshape(len(value), -1, self.width))

    def pooled(
        self, value: torch.Tensor, poolings: Sequence[str], mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """{pooling: (examples, width), at least in fp32}.

        Args:
            value: the output.
            poolings: of `POOLINGS`.
            mask: (examples, positions), True at tokens; None if every position counts. Texts without a token get zeros.
        """
        rows, mask = self.rows(value), mask if self.is_text else None
        pooled = {CLS: token_of(rows, "first", mask)} if CLS in poolings else {}
        if self.skipped:
            rows = rows[:, [i for i in range(rows.shape[1]) if i not in self.skipped]]
        if MEAN in poolings and mask is None:
            pooled[MEAN] = rows.mean(1)
        elif MEAN in poolings and mask is not None:
            pooled[MEAN] = rows.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1).clamp(min=1)[:, None]
        if MAX in poolings:
            pooled[MAX] = (rows if mask is None else rows.masked_fill(~mask[..., None], -math.inf)).amax(1)
        if mask is None:
            return pooled
        return {name: x.masked_fill(~mask.any(1)[:, None], 0) for name, x in pooled.items()}

    def without(self, skipped: tuple[int, ...]) -> Layout:
        """The layout with positions that are no patches."""
        return replace(self, skipped=skipped)


@dataclass(frozen=True)
class HeadInput:
    """The input of the classifier head.

    Attributes:
        width: number of features.
        token: which token of each text the head reads, `first` or `last`; empty if its input is one vector per example.
    """

    width: int
    token: str = ""

    def pooled(
        self, value: torch.Tensor, poolings: Sequence[str], mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """{`input`: (examples, width), at least in fp32}."""
        vectors = token_of(value, self.token, mask) if self.token else value.reshape(len(value), -1)
        return {HEAD_INPUT: _at_least_fp32(vectors)}


def _at_least_fp32(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()


def token_of(value: torch.Tensor, which: str, mask: torch.Tensor | None) -> torch.Tensor:
    """(examples, …): the first or the last token of each text in (examples, positions, …), padding left out."""
    if mask is None:
        return value[:, 0 if which == "first" else -1]
    positions = torch.arange(value.shape[1], device=value.device)
    place = mask.int().argmax(1) if which == "first" else (mask * positions).argmax(1)
    return value[torch.arange(len(value), device=value.device), place]


def sides(positions: int, height: int, width: int) -> tuple[int, int] | None:
    """(rows, columns) of so many positions as a grid of patches, of equal size in both directions, of an image.

    None if they are no such grid.
    """
    for rows in range(1, positions + 1):
        if positions % rows == 0:
            columns = positions // rows
            if {math.ceil(height / rows), height // rows} & {math.ceil(width / columns), width // columns}:
                return rows, columns
    return None
