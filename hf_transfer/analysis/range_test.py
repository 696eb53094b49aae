"""The curve of a learning-rate range test, and the learning rates that it suggests.

Range test: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3: the learning rate rises at
each step, and the loss shows where training begins to work and where it diverges. The smoothing and the three
suggestions are fastai's (`Learner.lr_find`).
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hf_transfer.errors import UserError

SMOOTHING = 0.98  # of the exponential moving average of the loss
DIVERGED = 4.0  # times the lowest smoothed loss, at which a test ends
LEAST_STEPS = 20  # below, a suggestion is noise
_SKIPPED = 0.1  # of the steps at the start, while the average settles
_LAST = 5  # steps at the end, where the loss diverges
CHOSEN = "valley"  # what `learning_rate: auto` takes


@dataclass(frozen=True)
class Sweep:
    """What a range test goes through.

    Attributes:
        start: learning rate of the first step, as the key `learning_rate` counts it.
        end: learning rate of the last step.
        steps: number of optimizer steps.
        stage: number of the stage that is tried, counted from 0; None for the first that trains the backbone.
    """

    start: float = 1e-7
    end: float = 1.0
    steps: int = 100
    stage: int | None = None

    def check(self) -> None:
        """Raises:
        UserError: the test would say nothing.
        """
        if self.steps < LEAST_STEPS:
            raise UserError(
                f"a range test of {self.steps} steps is too short: it takes at least {LEAST_STEPS}.",
                "Use 100, or more for small batches.",
                key="num_steps",
            )
        if not 0 < self.start < self.end:
            raise UserError(
                f"the learning rate must rise, and {self.start:g} is not below {self.end:g}.", key="start_learning_rate"
            )


@dataclass(frozen=True)
class Curve:
    """The loss at each learning rate.

    Attributes:
        rates: of each step, rising.
        losses: of each step's batch, before the step.
        diverged: whether the test ended early, because the loss rose to `DIVERGED` times its lowest or was not finite.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool = False

    @property
    def smoothed(self) -> tuple[float, ...]:
        """Exponential moving average of the losses, corrected for its start at 0."""
        return tuple(smooth(self.losses))

    @property
    def suggestions(self) -> dict[str, float]:
        """{`valley`, `steep`, `minimum`: learning rate}; empty where the smoothed loss falls by no more than its noise.

        `valley` is in the middle of the longest fall of the smoothed loss, `steep` where it falls fastest per decade,
        and `minimum` a tenth of where it is lowest.
        """
        cut = slice(int(len(self.rates) * _SKIPPED), len(self.rates) - _LAST)
        rates, losses = self.rates[cut], self.smoothed[cut]
        if len(losses) < 3:
            return {}
        lowest = min(range(len(losses)), key=losses.__getitem__)
        if max(losses[: lowest + 1]) - losses[lowest] <= self._noise:
            return {}
        return {name: find(rates, losses) for name, find in SUGGESTIONS.items()}

    @property
    def _noise(self) -> float:
        """By how much the average moves where nothing is learned: three of its standard deviations, from the first
        quarter of the test, and what rounding does."""
        quiet = self.losses[: max(2, len(self.losses) // 4)]
        spread = statistics.stdev(quiet) * math.sqrt((1 - SMOOTHING) / (1 + SMOOTHING))
        return 3 * spread + 1e-6 * abs(quiet[0])

    def to_csv(self) -> str:
        """A line per step: `learning_rate`, `loss`, `smoothed_loss`."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("learning_rate", "loss", "smoothed_loss"))
        rows = zip(self.rates, self.losses, self.smoothed, strict=True)
        writer.writerows([f"{value:.8g}" for value in row] for row in rows)
        return file.getvalue()


def smooth(losses: Sequence[float], beta: float = SMOOTHING) -> Iterator[float]:
    """The average at each step, corrected for its start at 0."""
    average = 0.0
    for step, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss
        yield average / (1 - beta**step)


def has_diverged(smoothed: Sequence[float]) -> bool:
    """Whether the last average is not finite, or `DIVERGED` times the lowest."""
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > DIVERGED * min(smoothed)


def rates_between(start: float, end: float, steps: int) -> list[float]:
    """So many learning rates from `start` to `end`, each the same multiple of the one before."""
    return [start * (end / start) ** (i / (steps - 1)) for i in range(steps)]


# ---- suggestions ---------------------------------------------------------------------------------------------------


def _valley(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The middle of the longest fall: the longest decreasing subsequence, which need not be without gaps."""
    lengths = [1] * len(losses)
    for i in range(1, len(losses)):
        lengths[i] += max((lengths[j] for j in range(i) if losses[i] < losses[j]), default=0)
    end = max(range(len(losses)), key=lengths.__getitem__)
    begin = max(0, end - lengths[end])
    third = (end - begin) / 3
    return rates[begin + int(third) + int(third / 2)]


def _steep(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Where the slope of the loss over the logarithm of the learning rate is lowest."""
    slopes = [
        (after - before) / (math.log(rates[i + 1]) - math.log(rates[i]))
        for i, (before, after) in enumerate(itertools.pairwise(losses))
    ]
    return rates[min(range(len(slopes)), key=slopes.__getitem__)]


def _minimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the learning rate at which the loss is lowest."""
    return rates[min(range(len(losses)), key=losses.__getitem__)] / 10


SUGGESTIONS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "valley": _valley,
    "steep": _steep,
    "minimum": _minimum,
}
