"""How far apart the features of two domains are: proxy A-distance, maximum mean discrepancy, and a plane to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_transfer.analysis.out_of_fold import out_of_fold
from hf_transfer.objectives.adaptation.mmd import mmd

FEWEST = 10  # examples of each domain

Rows = torch.Tensor  # (examples, width)


@dataclass(frozen=True)
class Distance:
    """The distance of two samples of features.

    Attributes:
        proxy_a_distance: 2 (1 - 2 e), where e is the error of a linear classifier that tells the domains apart, in
            cross-validation (Ben-David et al. 2007, section 5; Glorot et al. 2011, section 4.4): 2 where it always can,
            0 where it cannot. An error above chance counts as chance.
        error: e.
        mmd: the squared maximum mean discrepancy of `objectives.adaptation.mmd`, the unbiased estimate.
    """

    proxy_a_distance: float
    error: float
    mmd: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def distance(source: Rows, target: Rows, seed: int) -> Distance:
    """The distance of two samples of equal size, at least `FEWEST` examples each.

    Args:
        source: (examples, width) features.
        target: likewise.
        seed: of the folds.
    """
    assert len(source) == len(target), "chance is one half"
    both = torch.cat([source, target]).double()
    domain = torch.arange(2).repeat_interleave(len(source))
    answers = out_of_fold(both.float(), domain, repeats=1, seed=seed).probabilities.argmax(1)
    error = float((torch.from_numpy(answers) != domain).double().mean())
    return Distance(max(0.0, 2 * (1 - 2 * error)), error, float(mmd(both[: len(source)], both[len(source) :])))


@dataclass(frozen=True)
class Plane:
    """Two samples in the plane of the two directions in which both together vary most (principal components).

    Attributes:
        source: (examples, 2).
        target: likewise.
        shares: of the variance, of each direction.
    """

    source: Rows
    target: Rows
    shares: tuple[float, float]


def plane(source: Rows, target: Rows) -> Plane:
    """The plane of two samples; each direction points to where its largest component is positive."""
    both = torch.cat([source, target]).double()
    centered = both - both.mean(0)
    _, sizes, axes = torch.linalg.svd(centered, full_matrices=False)
    axes = torch.nn.functional.pad(axes, (0, 0, 0, max(0, 2 - len(axes))))[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    variances = torch.nn.functional.pad(sizes.square(), (0, 2))
    total = max(float(variances.sum()), torch.finfo(both.dtype).tiny)
    points = centered @ axes.T
    shares = float(variances[0]) / total, float(variances[1]) / total
    return Plane(points[: len(source)], points[len(source) :], shares)
