"""Cross-validation of the convex head: folds, and what heads say of examples that they were not solved for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hf_transfer.features.convex_head import MULTI, REGRESSION, SINGLE, STRENGTHS, Problem, one_thread
from hf_transfer.features.fold_heads import logits_of_parts

FOLDS = 5

Array = np.ndarray[Any, Any]


def divisions(kind: str, labels: torch.Tensor, repeats: int, seed: int, folds: int = FOLDS) -> list[Array]:
    """Several draws of `fold_numbers`.

    Args:
        kind: `problem_type` as in `transformers` configurations.
        labels: as `features.convex_head.Problem` takes them.
        repeats: number of draws.
        seed: of the first draw; each has its own.
        folds: in each draw, at most as many as there are examples.
    """
    stratum = strata(kind, labels)
    return [fold_numbers(stratum, min(folds, len(labels)), seed + i) for i in range(repeats)]


def fold_numbers(stratum: Array, folds: int, seed: int) -> Array:
    """(examples,) number of each example's fold: the members of a stratum are dealt out in turn, in random order.

    A stratum with fewer examples than folds has each of them in a fold of its own.

    Args:
        stratum: (examples,) of `strata`.
        folds: number of folds.
        seed: of the order.
    """
    chance = np.random.default_rng(seed)
    order = np.concatenate([chance.permutation(np.flatnonzero(stratum == value)) for value in np.unique(stratum)])
    numbers = np.empty(len(order), dtype=int)
    numbers[order] = np.arange(len(order)) % folds
    return numbers


def stratified_order(stratum: Array, seed: int) -> Array:
    """All positions in an order of which every beginning has the strata in their proportions, at random otherwise.

    Args:
        stratum: (examples,) of `strata`.
        seed: of the order.
    """
    chance = np.random.default_rng(seed)
    place = np.empty(len(stratum))
    for value in np.unique(stratum):
        members = chance.permutation(np.flatnonzero(stratum == value))
        place[members] = (np.arange(len(members)) + chance.random()) / len(members)
    return np.argsort(place, kind="stable")


def strata(kind: str, labels: torch.Tensor) -> Array:
    """(examples,) what folds are stratified by: the class; of several the rarest, or -1 for none; a regression has one.

    Args:
        kind: `problem_type` as in `transformers` configurations.
        labels: as `features.convex_head.Problem` takes them.
    """
    if kind == SINGLE:
        return labels.numpy()
    if kind != MULTI:
        return np.zeros(len(labels), dtype=int)
    positive = labels.numpy() > 0
    counts = np.where(positive, positive.sum(0), len(labels) + 1)
    return np.where(positive.any(1), counts.argmin(1), -1)


def held_out_logits(
    kind: str,
    features: torch.Tensor,
    labels: torch.Tensor,
    outputs: int,
    draws: Sequence[Array],
    strengths: Sequence[float] = STRENGTHS,
    weights: torch.Tensor | None = None,
    has_bias: bool = True,
    whole: Problem | None = None,
) -> Iterator[torch.Tensor]:
    """For each L2 strength, (draws, examples, outputs) logits in float64 by heads that were solved for on other folds.

    Args:
        kind: of the `features.convex_head.Problem`, like the next three and the last three.
        features: (examples, width).
        labels: of the examples.
        outputs: of the head.
        draws: of `divisions`.
        strengths: from strong to weak.
        weights: of the classes.
        has_bias: whether the head has a bias.
        whole: the problem of all examples, if it is there already.
    """
    held_out = [(i, np.flatnonzero(draw == fold)) for i, draw in enumerate(draws) for fold in np.unique(draw)]
    if kind == REGRESSION:
        paths = _regressions(features, labels, outputs, [rows for _, rows in held_out], strengths, has_bias)
    else:
        learned_from = np.ones((len(held_out), len(labels)), dtype=bool)
        for part, (_, rows) in zip(learned_from, held_out, strict=True):
            part[rows] = False
        whole = whole or Problem(kind, features, labels, outputs, weights, has_bias)
        every = logits_of_parts(whole, learned_from, strengths)
        paths = ([one[rows] for one, (_, rows) in zip(parts, held_out, strict=True)] for parts in every)
    for parts in paths:
        logits = torch.empty(len(draws), len(labels), outputs, dtype=torch.float64)
        for (i, rows), own in zip(held_out, parts, strict=True):
            logits[i, rows] = own
        yield logits


def _regressions(
    features: torch.Tensor,
    labels: torch.Tensor,
    outputs: int,
    held_out: Sequence[Array],
    strengths: Sequence[float],
    has_bias: bool,
) -> Iterator[list[torch.Tensor]]:
    """For each L2 strength predictions of the held-out rows of each fold."""
    every = np.arange(len(labels))
    products = features.numel() * max(outputs, min(features.shape))
    with one_thread(products):
        rest = [np.setdiff1d(every, rows) for rows in held_out]
        problems = [Problem(REGRESSION, features[rows], labels[rows], outputs, None, has_bias) for rows in rest]
        held = [features[rows].double() for rows in held_out]
    paths = [problem.path(strengths) for problem in problems]
    for _ in strengths:
        with one_thread(products):  # not around `yield`: what the caller does is its own
            predicted = [next(path).logits(x) for x, path in zip(held, paths, strict=True)]
        yield predicted
