"""Correlation alignment: the distance of two samples' covariances."""

from __future__ import annotations

import torch


def coral(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """|C_s - C_t|² / (4 d²) with the Frobenius norm, a scalar (Sun and Saenko 2016, equation 1).

    Args:
        source: (n, d); 0, without a gradient, if it or the target has a single row, which has no covariance.
        target: (m, d).
    """
    if min(len(source), len(target)) < 2:
        return (source.sum() + target.sum()) * 0
    difference = _covariance(source) - _covariance(target)
    return difference.square().sum() / (4 * source.shape[1] ** 2)


def _covariance(rows: torch.Tensor) -> torch.Tensor:
    centered = rows - rows.mean(0)
    return centered.T @ centered / (len(rows) - 1)
