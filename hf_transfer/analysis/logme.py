"""LogME: the evidence for a linear model of the labels on frozen features (You et al. 2021, ICML).

Each class is a regression on 0 and 1 with a Gaussian prior on the weights and Gaussian noise, whose two precisions
maximize the evidence; LogME is its logarithm per example, averaged over classes. Nothing is held out, and no head is
trained: a second opinion beside cross-validation.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

_STEPS = 100  # of the fixed-point iteration, at most
_TOLERANCE = 1e-4  # relative change of the ratio of the precisions


def logme(features: torch.Tensor, labels: torch.Tensor, outputs: int) -> float:
    """LogME of features for classes; the higher the better, comparable only for the same examples.

    Args:
        features: (examples, width).
        labels: (examples,) classes.
        outputs: number of classes.
    """
    x = features.double()
    left, singular, _ = torch.linalg.svd(x, full_matrices=False)
    kept = singular > 1e-10 * singular.max().clamp(min=1e-300)
    left, squares = left[:, kept], singular[kept].square()
    targets = functional.one_hot(labels, outputs).double()
    found = [_evidence(left, squares, targets[:, i], x.shape[1]) for i in range(outputs)]
    return sum(found) / len(found)


def _evidence(left: torch.Tensor, squares: torch.Tensor, y: torch.Tensor, width: int) -> float:
    """Logarithm of the evidence per example, at the precisions that maximize it (MacKay 1992).

    Args:
        left: (examples, rank) left singular vectors of the features.
        squares: (rank,) squared singular values.
        y: (examples,) of the regression.
        width: of the features.
    """
    count = len(y)
    along = (left.T @ y).square()  # of y in the axes
    beyond = float(y @ y - along.sum())  # of y, which no weights reach
    prior, noise = 1.0, 1.0  # precisions
    for _ in range(_STEPS):
        ratio = prior / noise
        shrink = squares / (squares + ratio)
        weights = float((squares * along / (squares + ratio).square()).sum())
        error = float(((ratio / (squares + ratio)).square() * along).sum()) + max(beyond, 0.0)
        effective = float(shrink.sum())
        prior, noise = effective / max(weights, 1e-12), max(count - effective, 1e-6) / max(error, 1e-12)
        if abs(prior / noise - ratio) <= _TOLERANCE * ratio:
            break
    ratio = prior / noise
    weights = float((squares * along / (squares + ratio).square()).sum())
    error = float(((ratio / (squares + ratio)).square() * along).sum()) + max(beyond, 0.0)
    determinant = float((prior + noise * squares).log().sum()) + (width - len(squares)) * math.log(prior)
    total = width * math.log(prior) + count * math.log(noise / (2 * math.pi))
    return (total - noise * error - prior * weights - determinant) / (2 * count)
