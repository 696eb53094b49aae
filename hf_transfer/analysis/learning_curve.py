"""How the error of a head falls with the number of training examples: measured on subsets, and continued.

The curve is an inverse power law, error(n) = a + b * n ** -c (Cortes et al. 1994, "Learning curves: asymptotic values
and rate of convergence"; Figueroa et al. 2012, "Predicting sample size required for classification performance"). Few
points on few examples do not determine three numbers, so that no single fit is trusted: for every c of a grid, a and b
are fitted, and what the fits predict is averaged with their likelihoods as weights. Their disagreement is the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch.nn import functional

from hf_transfer.features.convex_head import SINGLE, Problem
from hf_transfer.features.cross_validation import Array, strata, stratified_order
from hf_transfer.features.fold_heads import logits_of_parts

# (fraction of the examples to solve with, number of draws); the rest of the examples is predicted.
SIZES = ((1 / 8, 8), (1 / 4, 6), (1 / 2, 5), (4 / 5, 5))
_EXPONENTS = tuple(i / 10 for i in range(1, 11))
_LEAST = 4  # examples of a subset


@dataclass(frozen=True)
class Point:
    """Heads that were solved for on subsets of one size.

    Attributes:
        examples: in a subset.
        error: fraction of the other examples that the heads get wrong.
        spread: standard error of `error` over the draws.
    """

    examples: int
    error: float
    spread: float


@dataclass(frozen=True)
class Forecast:
    """What a curve says of some number of examples, and of twice as many.

    Attributes:
        error: fraction of examples that are wrong.
        error_sd: by how much the fits disagree on it.
        gain: by how much `error` is lower with twice as many.
        gain_sd: by how much the fits disagree on that.
    """

    error: float
    error_sd: float
    gain: float
    gain_sd: float


def measure(
    x: torch.Tensor, labels: torch.Tensor, outputs: int, strengths: Sequence[float], seed: int
) -> tuple[Point, ...]:
    """Points of the curve, smallest first; at each size the L2 strength with the lowest mean loss counts.

    Args:
        x: (examples, width) features.
        labels: (examples,) classes.
        outputs: number of classes.
        strengths: from strong to weak.
        seed: of the subsets, which have the classes in their proportions.
    """
    stratum, subsets, sizes = strata(SINGLE, labels), list[Array](), list[int]()
    for fraction, draws in SIZES:
        size = round(fraction * len(labels))
        if size < max(_LEAST, outputs):
            continue
        for draw in range(draws):
            subset = np.zeros(len(labels), dtype=bool)
            subset[stratified_order(stratum, seed + draw)[:size]] = True
            subsets.append(subset)
            sizes.append(size)
    if not subsets:
        return ()
    losses, errors = np.empty((len(subsets), len(strengths))), np.empty((len(subsets), len(strengths)))
    paths = logits_of_parts(Problem(SINGLE, x, labels, outputs), np.stack(subsets), strengths)
    for i, logits in enumerate(paths):
        for j, (own, subset) in enumerate(zip(logits, subsets, strict=True)):
            rest = torch.from_numpy(~subset)
            losses[j, i] = functional.cross_entropy(own[rest], labels[rest])
            errors[j, i] = (own[rest].argmax(1) != labels[rest]).double().mean()
    found = []
    for size in dict.fromkeys(sizes):
        of_size = np.array(sizes) == size
        best = errors[of_size, losses[of_size].mean(0).argmin()]
        found.append(Point(size, float(best.mean()), float(best.std(ddof=1) / np.sqrt(len(best)))))
    return tuple(found)


def forecast(points: Sequence[Point], examples: int, looked_at: int) -> Forecast:
    """What the curve says of `examples`, and of twice as many.

    Args:
        points: at least one.
        examples: number of training examples.
        looked_at: number of examples that the points were measured with. Their own noise, that of the draw of these
            examples, is common to the points: it moves the curve and says nothing of its shape.
    """
    sizes = np.array([point.examples for point in points], dtype=float)
    errors = np.array([point.error for point in points])
    # A spread of a few draws may be zero by chance.
    noise = np.sqrt([point.spread**2 + _within(point.error, looked_at) / 4 for point in points])
    at = np.array([examples, 2 * examples], dtype=float)
    fits, misfits = [], []
    for exponent in _EXPONENTS:
        powers = np.stack([np.ones_like(sizes), (sizes / sizes[-1]) ** -exponent], 1)
        (level, slope), norm = nnls(powers / noise[:, None], errors / noise)
        fits.append(level + slope * (at / sizes[-1]) ** -exponent)
        misfits.append(norm**2)
    weights = np.exp(-(np.array(misfits) - min(misfits)) / 2)
    weights /= weights.sum()
    both = np.array(fits)
    gains = both[:, 0] - both[:, 1]
    error, gain = float(weights @ both[:, 0]), float(weights @ gains)
    # The fits share the points, whose noise the last step of the curve inherits.
    inherited = float(noise[-1]) * (1 - 2.0 ** -_EXPONENTS[-1])
    return Forecast(
        error=error,
        error_sd=float(np.sqrt(weights @ (both[:, 0] - error) ** 2)),
        gain=gain,
        gain_sd=float(np.sqrt(weights @ (gains - gain) ** 2 + inherited**2)),
    )


def _within(error: float, examples: int) -> float:
    """Variance of an error rate that was counted on so many examples, never zero (Agresti & Coull 1998)."""
    shrunk = (error * examples + 2) / (examples + 4)
    return shrunk * (1 - shrunk) / examples
