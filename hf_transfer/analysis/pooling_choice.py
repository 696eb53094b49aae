"""Which layer of a frozen model, pooled how, separates the labels best: by cross-validation on the training data.

For each candidate the convex head (`features.convex_head`) is solved for on the other folds, for a path of L2
strengths, and the mean loss of the held-out examples decides: it is steadier than the number of right answers, which
moves in steps of 1/n. Folds are stratified and drawn several times, because at 16 examples per class one division into
folds is luck. All candidates share the folds, so that they are compared example by example.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from hf_transfer.features import FrozenFeatures
from hf_transfer.features.convex_head import MULTI, REGRESSION, SINGLE, STRENGTHS, Problem

FOLDS = 5
LEAST_EXAMPLES = 10  # below, a fold has one example
REPEATS = ((100, 4), (300, 2))  # (up to so many examples, divisions into folds); beyond them one
_PATIENCE = 2  # strengths, from strong to weak, without an improvement


@dataclass(frozen=True)
class Candidate:
    """A layer and how its output is pooled.

    Attributes:
        group: name of a layer group.
        pooling: `cls`, `mean` or `max`.
        loss: mean loss of held-out examples, at the best L2 strength.
        l2: that strength.
    """

    group: str
    pooling: str
    loss: float
    l2: float


@dataclass(frozen=True)
class PoolingChoice:
    """What cross-validation says.

    Attributes:
        best: the candidate with the lowest loss.
        own: what the model's own head reads.
        gain: by how much the loss of `best` is lower than that of `own`, per example.
        error: standard error of `gain` over the examples.
        candidates: all, best first.
    """

    best: Candidate
    own: Candidate
    gain: float
    error: float
    candidates: tuple[Candidate, ...]

    @property
    def pays(self) -> bool:
        """Whether the best candidate is better than the model's own by more than the standard error."""
        return self.gain > self.error

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def choose_pooling(
    features: FrozenFeatures,
    labels: torch.Tensor,
    kind: str,
    outputs: int,
    own: tuple[str, str],
    cells: Sequence[tuple[str, str]],
    seed: int,
    weights: torch.Tensor | None = None,
) -> PoolingChoice:
    """The best of some pooled layers.

    Args:
        features: of the training examples, with `cells` and `own`.
        labels: as `features.convex_head.Problem` takes them.
        kind: `problem_type` as in `transformers` configurations.
        outputs: of the head.
        own: (group, pooling) that the model's own head reads.
        cells: candidates, (group, pooling) each; equal losses are decided by their order.
        seed: of the folds.
        weights: (outputs,) of the classes; None for 1 each.
    """
    splits = folds(kind, labels, seed)
    found: dict[tuple[str, str], tuple[Candidate, torch.Tensor]] = {}
    for group, pooling in dict.fromkeys([*cells, own]):
        x = features.matrix(group, pooling)
        losses, l2 = held_out_losses(kind, x, labels, outputs, splits, weights)
        found[group, pooling] = Candidate(group, pooling, float(losses.mean()), l2), losses
    ranked = sorted((found[cell][0] for cell in dict.fromkeys(cells)), key=lambda one: one.loss)
    best, ours = ranked[0], found[own][0]
    difference = found[own][1] - found[best.group, best.pooling][1]
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return PoolingChoice(best, ours, float(difference.mean()), error, tuple(ranked))


def folds(kind: str, labels: torch.Tensor, seed: int) -> list[tuple[Any, Any]]:
    """[(training rows, held-out rows)] of all divisions; stratified by class where there is one class per example.

    A class with fewer examples than folds is missing from some held-out parts, or, with one example, from the training
    rows of the fold that holds it out.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    count = len(labels)
    repeats = next((times for most, times in REPEATS if count <= most), 1)
    number = min(FOLDS, count)
    is_stratified = kind == SINGLE and int(labels.bincount().max()) >= number
    splits: list[tuple[Any, Any]] = []
    for repeat in range(repeats):
        how = (StratifiedKFold if is_stratified else KFold)(number, shuffle=True, random_state=seed + repeat)
        with warnings.catch_warnings():  # about classes with fewer examples than folds
            warnings.simplefilter("ignore", UserWarning)
            splits += list(how.split(labels, labels if is_stratified else None))
    return splits


def held_out_losses(
    kind: str,
    x: torch.Tensor,
    labels: torch.Tensor,
    outputs: int,
    splits: Sequence[tuple[Any, Any]],
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """((examples,) loss of each when it was held out, at the best strength, meaned over divisions; that strength)."""
    problems = [Problem(kind, x[a], labels[a], outputs, weights) for a, _ in splits]
    best: tuple[float, torch.Tensor, float] | None = None
    waited = 0
    for strength, heads in zip(STRENGTHS, zip(*(p.path(STRENGTHS) for p in problems), strict=True), strict=True):
        losses = torch.zeros(len(x), dtype=torch.float64)
        for head, (_, held) in zip(heads, splits, strict=True):
            losses[held] += _losses(kind, head.logits(x[held]), labels[held])
        losses /= len(splits) / min(FOLDS, len(x))
        mean = float(losses.mean())
        waited = 0 if best is None or mean < best[0] else waited + 1
        if best is None or mean < best[0]:
            best = mean, losses, strength
        if waited >= _PATIENCE:
            break
    assert best is not None
    return best[1], best[2]


def _losses(kind: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if kind == REGRESSION:
        return (logits - labels).square().mean(1)
    if kind == MULTI:
        return functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").mean(1)
    return functional.cross_entropy(logits, labels, reduction="none")
