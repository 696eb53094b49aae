"""How long training still takes, from the steps that were taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

WARMUP = 2  # first steps of a stage: compilation, memory, caches


class Pace:
    """The time per step of the current stage, evaluations included.

    Stages differ by a factor of many in their time per step, so nothing is said of a stage that has not begun.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.restart(None, 0)

    def restart(self, stage: int | None, step: int) -> None:
        """A stage begins, or training goes on, after `step` optimizer steps."""
        self._stage, self._from, self._since = stage, step + WARMUP, math.nan
        self._step = step

    def note(self, stage: int | None, step: int) -> None:
        """Optimizer step number `step`, counted from 1, has been taken in `stage`."""
        if stage != self._stage:
            self.restart(stage, step - 1)
        self._step = step
        if step == self._from:
            self._since = self.clock()

    def left(self, end: int) -> float | None:
        """Seconds up to optimizer step `end`; None during the first steps."""
        taken = self._step - self._from
        if taken < 1:
            return None
        return (self.clock() - self._since) / taken * (end - self._step)


def spell(seconds: float) -> str:
    """A duration as a person would say it."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1) if seconds > 20 else round(seconds)):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(round(minutes, -1), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def exactly(seconds: float) -> str:
    """A duration to the second, or to the tenth of one below ten: 8.5 s, 2 min 55 s, 1 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest, units = *divmod(whole, 60), ("min", "s")
    else:
        minutes, rest, units = *divmod(round(whole / 60), 60), ("h", "min")
    return f"{minutes} {units[0]} {rest} {units[1]}" if rest else f"{minutes} {units[0]}"


def log_interval(fraction: float, steps: int) -> int:
    """Optimizer steps between log lines: a `fraction` of all steps, and in a short run a quarter of them or five."""
    return max(1, math.ceil(fraction * steps - 1e-9), min(5, math.ceil(steps / 4)))
