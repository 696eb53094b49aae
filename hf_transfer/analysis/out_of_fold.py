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

from hf_transfer.features.convex_head import MULTI, SINGLE, STRENGTHS
from hf_transfer.features.cross_validation import FOLDS, divisions, held_out_logits

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
    draws = divisions(kind, labels, repeats, seed, folds)
    paths = held_out_logits(kind, features, labels, outputs, draws, strengths)
    best, worse = OutOfFold(np.empty(0), 0.0, np.inf), 0
    for strength, logits in zip(strengths, paths, strict=False):  # the last ones are not solved for
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
