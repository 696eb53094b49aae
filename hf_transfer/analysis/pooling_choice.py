"""Which layer of a frozen model, pooled how, separates the labels best: by cross-validation on the training data.

For each candidate the convex head (`features.convex_head`) is solved for on the other folds, for a path of L2
strengths, and the mean loss of the held-out examples decides: it is steadier than the number of right answers, which
moves in steps of 1/n. Folds are stratified and drawn several times, because at 16 examples per class one division into
folds is luck. All candidates share the folds, so that they are compared example by example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from hf_transfer.features import FrozenFeatures
from hf_transfer.features.convex_head import MULTI, REGRESSION, STRENGTHS
from hf_transfer.features.cross_validation import Array, divisions, held_out_logits

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
        margin: standard errors by which the best must be better; negative: by which it may be worse. Of a head that
            loads anywhere the first token is kept only if it is clearly better: with 16 examples per class it had the
            lower loss in 5 of 40 draws, and was less accurate in each of them, by 8 points in the mean.
    """

    best: Candidate
    own: Candidate
    gain: float
    error: float
    candidates: tuple[Candidate, ...]
    margin: float = -2.0

    @property
    def pays(self) -> bool:
        """Whether the best candidate is better than the model's own by more than `margin` standard errors."""
        return self.gain > self.margin * self.error


def choose_pooling(
    features: FrozenFeatures,
    labels: torch.Tensor,
    kind: str,
    outputs: int,
    own: tuple[str, str],
    cells: Sequence[tuple[str, str]],
    seed: int,
    weights: torch.Tensor | None = None,
    accept: Callable[[str, str], bool] = lambda *_: True,
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
        accept: whether a cell can be chosen; asked of the best first.
    """
    repeats = next((times for most, times in REPEATS if len(labels) <= most), 1)
    draws = divisions(kind, labels, repeats, seed)
    found: dict[tuple[str, str], tuple[Candidate, torch.Tensor]] = {}
    for group, pooling in dict.fromkeys([*cells, own]):
        x = features.matrix(group, pooling)
        losses, l2 = held_out_losses(kind, x, labels, outputs, draws, weights)
        found[group, pooling] = Candidate(group, pooling, float(losses.mean()), l2), losses
    ranked = sorted((found[cell][0] for cell in dict.fromkeys(cells)), key=lambda one: one.loss)
    ours = found[own][0]
    best = next((one for one in ranked if accept(one.group, one.pooling)), ours)
    difference = found[own][1] - found[best.group, best.pooling][1]
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return PoolingChoice(best, ours, float(difference.mean()), error, tuple(ranked))


def held_out_losses(
    kind: str,
    x: torch.Tensor,
    labels: torch.Tensor,
    outputs: int,
    draws: Sequence[Array],
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """((examples,) loss of each when it was held out, at the best strength, meaned over draws; that strength)."""
    paths = held_out_logits(kind, x, labels, outputs, draws, STRENGTHS, weights)
    best: tuple[float, torch.Tensor, float] | None = None
    waited = 0
    for strength, logits in zip(STRENGTHS, paths, strict=False):  # the weakest are not solved for
        losses = torch.stack([_losses(kind, one, labels, weights) for one in logits]).mean(0)
        mean = float(losses.mean())
        waited = 0 if best is None or mean < best[0] else waited + 1
        if best is None or mean < best[0]:
            best = mean, losses, strength
        if waited >= _PATIENCE:
            break
    assert best is not None
    return best[1], best[2]


def _losses(kind: str, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """(examples,) losses, whose mean is the loss that the head is solved for."""
    if kind == REGRESSION:
        return (logits - labels).square().mean(1)
    weights = None if weights is None else weights.double()
    if kind == MULTI:
        each = functional.binary_cross_entropy_with_logits(
            logits, labels.double(), pos_weight=weights, reduction="none"
        )
        return each.mean(1)
    each = functional.cross_entropy(logits, labels, weight=weights, reduction="none")
    return each if weights is None else each / weights[labels].mean()
