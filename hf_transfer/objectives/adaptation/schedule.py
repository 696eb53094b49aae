"""The weight of an adaptation penalty over a run."""

from __future__ import annotations

import math

from hf_transfer.config.arguments.adaptation import RAMP


def ramp(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1, from 0 to almost 1 (Ganin et al. 2016, section 5.2.2).

    Args:
        progress: p, the fraction of the run that is done, between 0 and 1.
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1


def weight_at(schedule: str, weight: float, progress: float) -> float:
    """The weight at a fraction of the run; `schedule` is `domain_adaptation_schedule`."""
    return weight * ramp(progress) if schedule == RAMP else weight
