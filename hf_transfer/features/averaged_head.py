"""The average of linear heads on parts of the features: one linear head on all of them (`pooling_layer: average`).

Each head is solved for alone, on the features of one layer, all with the same L2 strength; their mean logits are linear
in all features together. That is not the head that would be solved for on all of them, which has more to fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hf_transfer.features.convex_head import STRENGTHS, Head, Problem
from hf_transfer.features.cross_validation import Array, held_out_logits


class AveragedProblem:
    """As `convex_head.Problem`, whose solutions it averages.

    Args:
        parts: widths of the parts of the features.
        kind: as of `Problem`, like the others.
        features: (examples, sum of `parts`).
        labels: likewise.
        outputs: likewise.
        weights: likewise.
        has_bias: likewise.
    """

    def __init__(
        self,
        parts: Sequence[int],
        kind: str,
        features: torch.Tensor,
        labels: torch.Tensor,
        outputs: int,
        weights: torch.Tensor | None = None,
        has_bias: bool = True,
    ):
        split = features.split(tuple(parts), 1)
        self.problems = [Problem(kind, x, labels, outputs, weights, has_bias) for x in split]

    def path(self, strengths: Sequence[float]) -> Iterator[Head]:
        """As of `Problem`."""
        for heads in zip(*(problem.path(strengths) for problem in self.problems), strict=True):
            yield average(heads)

    def exact(self, strength: float) -> Head:
        """As of `Problem`."""
        return average([problem.exact(strength) for problem in self.problems])

    def loss(self, head: Head, features: torch.Tensor) -> float:
        """As of `Problem`: of a head on all features."""
        return self.problems[0].loss(head, features)


def average(heads: Sequence[Head]) -> Head:
    """The head on features one after the other whose logits are the mean of the heads' on their own."""
    biases = [head.bias for head in heads if head.bias is not None]
    bias = torch.stack(biases).mean(0) if biases else None
    return Head(torch.cat([head.weight / len(heads) for head in heads], 1), bias)


def averaged_logits(
    parts: Sequence[int],
    kind: str,
    features: torch.Tensor,
    labels: torch.Tensor,
    outputs: int,
    draws: Sequence[Array],
    strengths: Sequence[float] = STRENGTHS,
    weights: torch.Tensor | None = None,
    has_bias: bool = True,
    wholes: Sequence[Problem] | None = None,
) -> Iterator[torch.Tensor]:
    """As `cross_validation.held_out_logits`, of averages of heads on parts of the features; `parts` as above.

    `wholes` are the problems of all examples, by part, if they are there already.
    """
    split = features.split(tuple(parts), 1)
    known: Sequence[Problem | None] = wholes or [None] * len(split)
    paths = [
        held_out_logits(kind, x, labels, outputs, draws, strengths, weights, has_bias, whole)
        for x, whole in zip(split, known, strict=True)
    ]
    for logits in zip(*paths, strict=True):
        yield torch.stack(logits).mean(0)
