"""The maximum mean discrepancy of two samples under several Gaussian kernels."""

from __future__ import annotations

import torch

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the median squared distance: the bandwidths


def mmd(source: torch.Tensor, target: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """The squared maximum mean discrepancy, a scalar (Gretton et al. 2012, equations 3 and 5).

    The kernel is the mean of exp(-|x - y|² / g) over the bandwidths g, as in deep adaptation networks (Long et al.
    2015, section 3.1). They are multiples of the median squared distance of any two different rows of both samples,
    through which no gradient flows.

    Args:
        source: (n, width).
        target: (m, width).
        unbiased: leave out the kernel of a row with itself; the estimate may then be negative, and is 0, without a
            gradient, of a sample with a single row. Otherwise equal samples have exactly 0 up to rounding.
    """
    n, both = len(source), torch.cat([source, target])
    if unbiased and min(n, len(target)) < 2:
        return both.sum() * 0
    distances = _squared_distances(both)
    apart = ~torch.eye(len(both), dtype=torch.bool, device=both.device)
    median = distances.detach()[apart].median().clamp(min=torch.finfo(both.dtype).tiny)
    kernel = torch.stack([(-distances / (median * factor)).exp() for factor in FACTORS]).mean(0)
    within = [_mean(kernel[part, part], unbiased) for part in (slice(0, n), slice(n, None))]
    return within[0] + within[1] - 2 * kernel[:n, n:].mean()


def _squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """(rows, rows); centered first, because the difference of large products loses digits."""
    centered = rows - rows.detach().mean(0)
    squares = centered.square().sum(1)
    return (squares[:, None] + squares[None] - 2 * centered @ centered.T).clamp(min=0)


def _mean(kernel: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """The mean of a square kernel matrix; of what is not on its diagonal, if unbiased."""
    if not unbiased:
        return kernel.mean()
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
