"""Alignment of frozen features: an affine map of the source's features, after which their mean and covariance are those
of the target's.

A head that is solved for on the mapped source reads the target's features as they are, so nothing of the map is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_transfer.config.arguments.adaptation import CORAL, LINEAR_OT

_NULL = 1e-12  # smaller eigenvalues, relative to the largest, are rounding errors

Rows = torch.Tensor  # (examples, width)


@dataclass(frozen=True)
class Alignment:
    """x → (x - source mean) A + target mean.

    Attributes:
        source: (width,) mean, float64.
        target: (width,) likewise.
        matrix: (width, width) A.
    """

    source: torch.Tensor
    target: torch.Tensor
    matrix: torch.Tensor

    def __call__(self, rows: Rows) -> Rows:
        """(examples, width) of source features, in their dtype."""
        return ((rows.double() - self.source) @ self.matrix + self.target).to(rows)


def align(method: str, source: Rows, target: Rows) -> Alignment:
    """The map of a method from source to target features.

    Args:
        method: `coral` or `linear-ot`.
        source: (examples, width).
        target: (examples, width).
    """
    own, other = covariance(source), covariance(target)
    return Alignment(source.double().mean(0), target.double().mean(0), _MAPS[method](own, other))


def coral_map(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """C_s^(-1/2) C_t^(1/2): whitening, then coloring (Sun, Feng and Saenko 2016, algorithm 1).

    Args:
        source: (width, width) covariance C_s.
        target: likewise C_t.
    """
    return power(source, -0.5) @ power(target, 0.5)


def transport_map(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """C_s^(-1/2) (C_s^(1/2) C_t C_s^(1/2))^(1/2) C_s^(-1/2): optimal transport between normal distributions.

    Of all maps with these moments it moves the examples least (Flamary et al. 2019, equation 9).

    Args:
        source: (width, width) covariance C_s.
        target: likewise C_t.
    """
    root, inverse = power(source, 0.5), power(source, -0.5)
    return inverse @ power(root @ target @ root, 0.5) @ inverse


_MAPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    CORAL: coral_map,
    LINEAR_OT: transport_map,
}


def covariance(rows: Rows) -> torch.Tensor:
    """(width, width) in float64, of features shrunk towards uncorrelated ones of equal relative variance.

    By as much as the sample is too small for (Ledoit and Wolf 2004), on standardized features, so that their scales do
    not decide.

    Args:
        rows: (examples, width).
    """
    from sklearn.covariance import ledoit_wolf  # slow to import

    rows = rows.double()
    centered, sizes = rows - rows.mean(0), rows.std(0, correction=0)
    sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    shrunk = torch.from_numpy(ledoit_wolf((centered / sizes).numpy())[0])
    return sizes[:, None] * shrunk * sizes


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """The power of a symmetric positive semidefinite matrix; in directions without variance, 0."""
    values, axes = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > _NULL * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    return (axes[:, kept] * values[kept].pow(exponent)) @ axes[:, kept].T
