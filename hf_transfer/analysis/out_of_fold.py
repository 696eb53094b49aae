"""Out-of-fold probabilities: what a linear head on frozen features says of examples that it was not solved for on.

The folds are stratified and drawn several times, and the probabilities of the draws are averaged. The L2 strength is
the one with the least out-of-fold log-loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hf_transfer.features.convex_head import MULTI, SINGLE, STRENGTHS, Problem

FOLDS = 5
REPEATS = 2
_PATIENCE = 2  # weaker strengths that are tried after the best one; they take longest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutOfFold:
    """Probabilities of examples by heads that were solved for without them.

    Attributes:
        probabilities: (examples, classes) in float64; rows sum to 1 for one label per example.
        l2: strength of the heads' penalty.
        loss: mean log-loss of the given labels, summed over labels if there are several per example.
    """

    probabilities: Array
    l2: float
    loss: float


def out_of_fold(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    folds: int = FOLDS,
    repeats: int = REPEATS,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> OutOfFold:
    """Probabilities of each example by linear heads that were solved for on the other folds.

    Args:
        features: (examples, width).
        labels: (examples,) classes, each with at least two examples; or (examples, classes) of 0 and 1, each class with
            at least two of both.
        folds: number of folds. A class with fewer examples has each of them in a fold of its own.
        repeats: draws of the folds.
        strengths: of the L2 penalty, from strong to weak.
        seed: of the draws.
    """
    kind = SINGLE if labels.dim() == 1 else MULTI
    outputs = int(labels.max()) + 1 if kind == SINGLE else labels.shape[1]
    draws = [fold_numbers(labels, folds, seed + i) for i in range(repeats)]
    held_out = [(i, np.flatnonzero(draw == fold)) for i, draw in enumerate(draws) for fold in np.unique(draw)]
    problems = []
    for _, rows in held_out:
        rest = np.setdiff1d(np.arange(len(labels)), rows)
        problems.append(Problem(kind, features[rest], labels[rest], outputs))
    best, worse = OutOfFold(np.empty(0), 0.0, np.inf), 0
    for strength, heads in zip(strengths, zip(*(p.path(strengths) for p in problems), strict=True), strict=True):
        logits = torch.empty(repeats, len(labels), outputs, dtype=torch.float64)
        for (i, rows), head in zip(held_out, heads, strict=True):
            logits[i, rows] = head.logits(features[rows])
        loss = sum(_log_loss(one, labels) for one in logits) / repeats
        if loss < best.loss:
            probabilities = (logits.softmax(-1) if kind == SINGLE else logits.sigmoid()).mean(0)
            best, worse = OutOfFold(probabilities.numpy(), strength, loss), 0
        elif (worse := worse + 1) >= _PATIENCE:
            break
    return best


def _log_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    if labels.dim() == 1:
        return float(functional.cross_entropy(logits, labels))
    return float(functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="sum") / len(labels))


def fold_numbers(labels: torch.Tensor, folds: int, seed: int) -> Array:
    """(examples,) number of each example's fold: the members of a class are dealt out in turn, in random order.

    With several labels per example, an example counts as a member of the rarest of its classes.
    """
    chance, stratum = np.random.default_rng(seed), strata(labels)
    order = np.concatenate([chance.permutation(np.flatnonzero(stratum == value)) for value in np.unique(stratum)])
    numbers = np.empty(len(order), dtype=int)
    numbers[order] = np.arange(len(order)) % folds
    return numbers


def strata(labels: torch.Tensor) -> Array:
    """(examples,) class of each example; of several the rarest, and -1 for an example without any."""
    if labels.dim() == 1:
        return labels.numpy()
    positive = labels.numpy() > 0
    counts = np.where(positive, positive.sum(0), len(labels) + 1)
    return np.where(positive.any(1), counts.argmin(1), -1)
