"""A plan whose run becomes shorter or longer while it runs: where in the plan each optimizer step is.

A re-planning says "from this step on, the run is so many steps long". What is left of the plan is then spread evenly
over the steps that are left. Position is a continuous, increasing function of the step, so a schedule that is read at
the position falls as the plan's does: no learning rate jumps, and the last step is the plan's last. A pure function of
the recorded re-plannings, so that a resumed run has the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hf_transfer.plan.plan import Plan

_ROUNDING = 1e-9  # relative


@dataclass(frozen=True)
class Replan:
    """One re-planning.

    Attributes:
        step: optimizer steps that had been taken.
        length: optimizer steps of the whole run from then on, more than `step`.
    """

    step: int
    length: int


@dataclass(frozen=True)
class Timeline:
    """The steps of a run and the positions in its plan.

    Attributes:
        planned: optimizer steps of the plan.
        replans: in the order in which they were made.
    """

    planned: int
    replans: tuple[Replan, ...] = ()

    @property
    def length(self) -> int:
        """Optimizer steps of the run."""
        return self.replans[-1].length if self.replans else self.planned

    def then(self, replan: Replan) -> Timeline:
        """The timeline with one more re-planning, which replaces one that was made at the same step."""
        assert replan.length > replan.step, "a run ends after the step that it is at"
        return replace(self, replans=(*(r for r in self.replans if r.step < replan.step), replan))

    def _segments(self) -> Iterator[tuple[int, float, float]]:
        """(first step, its position, positions per step) of each stretch."""
        step, position, pace = 0, 0.0, 1.0
        yield step, position, pace
        for replan in self.replans:
            position += (replan.step - step) * pace
            step = replan.step
            pace = (self.planned - position) / (replan.length - step)
            yield step, position, pace

    def position(self, step: int) -> float:
        """Where in the plan, in planned steps, optimizer step `step` (counted from 0) is."""
        if not self.replans:
            return step
        first, position, pace = [s for s in self._segments() if s[0] <= step][-1]
        return min(position + (step - first) * pace, float(self.planned))

    def first_step(self, position: float) -> int:
        """The first optimizer step at a position of the plan or after it."""
        first, begins, pace = [s for s in self._segments() if s[1] <= position or s[0] == 0][-1]
        return first + math.ceil((position - begins) / pace - _ROUNDING * max(1.0, position))

    def moved(self, plan: Plan) -> Plan:
        """The plan with the stages where this timeline has them; a stage has at least one step.

        Args:
            plan: resolved to planned steps. Stages that plateaus end stay where they are.
        """
        if not self.replans or plan.waits:
            return plan
        stages, earliest = [], 0
        for stage in plan.stages:
            assert stage.start is not None, "a resolved plan"
            start = max(self.first_step(stage.start), earliest)
            stages.append(replace(stage, start=start))
            earliest = start + 1
        return replace(plan, stages=tuple(stages))


@dataclass(frozen=True)
class Every:
    """Pauses at regular steps, and one at the end of the run.

    Attributes:
        interval: optimizer steps between two; None for no pauses at all.
        first: optimizer step before which there is none.
    """

    interval: float | None
    first: float = 0

    def within(self, step: int, length: int) -> int:
        """How many there are from the end of step number `step` (counted from 1; 0: the beginning) to the end."""
        begin = max(step, math.ceil(self.first), 1)
        if self.interval is None or begin > length:
            return 0
        return math.ceil(length / self.interval) - math.floor((begin - 1) / self.interval)


@dataclass(frozen=True)
class Costs:
    """What the rest of a run takes, in seconds.

    Attributes:
        steps: of an optimizer step in each stage.
        pauses: (when there is one, seconds of one): evaluations and checkpoints.
    """

    steps: Sequence[float]
    pauses: Sequence[tuple[Every, float]] = ()

    def rest(self, timeline: Timeline, plan: Plan, step: int) -> float:
        """Seconds after `step` optimizer steps to the end of a run.

        Args:
            timeline: of the run.
            plan: resolved to planned steps. If plateaus end stages, the current one is taken to be the last.
            step: optimizer steps that were taken.
        """
        stages, length = timeline.moved(plan).stages, timeline.length
        begun = [(i, stage.start) for i, stage in enumerate(stages) if stage.start is not None]
        seconds = 0.0
        for (i, start), end in zip(begun, [*(s for _, s in begun[1:]), length], strict=True):
            seconds += max(0, min(end, length) - max(start, step)) * self.steps[i]
        return seconds + sum(each * every.within(step, length) for every, each in self.pauses)

    def longest(self, timeline: Timeline, plan: Plan, step: int, seconds: float) -> int:
        """Optimizer steps of the longest run that ends in `seconds`: at least one more, at most the plan's.

        Args:
            timeline: up to now.
            plan: resolved to planned steps.
            step: optimizer steps that were taken.
            seconds: that are left.
        """
        low, high = step + 1, max(timeline.planned, step + 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.rest(timeline.then(Replan(step, middle)), plan, step) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low
