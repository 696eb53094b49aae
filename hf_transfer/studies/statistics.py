"""What a few seeds say of a row: intervals, paired differences, and several tests at once.

Intervals and tests are Student's t over seeds, which assumes that a metric varies about normally between them. They
describe the variation between seeds, not that between samples of held-out examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Values of several seeds.

    Attributes:
        mean: of the values.
        interval: [low, high] of the mean, 95%; None from one value, or where all are equal: then the seeds say nothing
            about the variation.
        p: that the mean is 0 (two-sided t test); None without an interval.
        count: number of values.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    count: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summary(values: Sequence[float]) -> Summary | None:
    """The mean with its t interval (Student 1908); None without values."""
    if not values:
        return None
    given, count = np.asarray(values, float), len(values)
    mean = float(given.mean())
    if count < 2 or float(given.max() - given.min()) <= 1e-12 * max(1.0, abs(mean)):
        return Summary(mean, None, None, count)
    error = float(given.std(ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Summary(mean, (mean - half, mean + half), p, count)


def paired(values: dict[int, float], first: dict[int, float]) -> Summary | None:
    """Differences `values - first` of the seeds that both have, with the paired t test; None without such seeds.

    Args:
        values: by seed.
        first: likewise.
    """
    return summary([values[seed] - first[seed] for seed in values if seed in first])


def holm(probabilities: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the chance of any false positive stays below the level."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted, highest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * probabilities[i]))
        adjusted[i] = highest
    return adjusted
