"""The same plan in fewer steps: exact positions, and no learning rate that jumps."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.plan.timeline import Costs, Every, Replan, Timeline


def plan(*epochs: float, steps_per_epoch: int = 10) -> Plan:
    stages = [Stage(f"s{i}", e, ("head",), (1.0,), (), 1) for i, e in enumerate(epochs)]
    return Plan("stages", (("head", 1),), tuple(stages), sum(epochs)).resolve(steps_per_epoch)


def starts(one: Plan) -> list[int | None]:
    return [stage.start for stage in one.stages]


def test_without_a_replanning_the_steps_are_the_plans():
    timeline = Timeline(100)
    assert [timeline.position(step) for step in (0, 7, 100)] == [0, 7, 100]
    assert timeline.length == 100 and timeline.moved(plan(2, 8)) == plan(2, 8)


def test_what_is_left_is_spread_over_the_steps_that_are_left():
    timeline = Timeline(100, (Replan(20, 60),))  # 80 planned steps in 40
    assert [timeline.position(step) for step in (0, 20, 21, 40, 59, 60)] == [0, 20, 22, 60, 98, 100]
    assert starts(timeline.moved(plan(1, 5, 4))) == [0, 10, 40]  # the second stage had begun; position 60 is step 40
    again = timeline.then(Replan(30, 90))  # 60 left of the plan, in 60 steps
    assert [again.position(step) for step in (20, 30, 31, 90)] == [20, 40, 41, 100]
    assert starts(again.moved(plan(1, 5, 4))) == [0, 10, 50]


def test_a_replanning_at_the_same_step_replaces_the_one_before():
    timeline = Timeline(100).then(Replan(5, 50)).then(Replan(5, 70))
    assert timeline.replans == (Replan(5, 70),) and timeline.length == 70


def test_a_stage_keeps_at_least_one_step():
    assert starts(Timeline(100, (Replan(0, 4),)).moved(plan(1, 1, 8))) == [0, 1, 2]


def test_any_replannings_leave_position_rising_and_what_has_begun_where_it_was():
    rng = random.Random(0)
    for _ in range(200):
        nominal = plan(*[rng.choice((0.2, 1, 3)) for _ in range(rng.randint(1, 5))])
        planned = max(round(nominal.num_train_epochs * 10), nominal.stages[-1].start + 1)
        timeline, step = Timeline(planned), 0
        for _ in range(rng.randint(1, 6)):
            step = rng.randint(step, timeline.length - 1)
            begun = [at for at in starts(timeline.moved(nominal)) if at <= step]
            later = timeline.then(Replan(step, rng.randint(step + 1, planned)))
            assert later.position(step) == pytest.approx(timeline.position(step))
            assert starts(later.moved(nominal))[: len(begun)] == begun
            timeline = later
        positions = [timeline.position(i) for i in range(timeline.length + 1)]
        assert all(a < b for a, b in itertools.pairwise(positions)) and positions[-1] == pytest.approx(planned)
        moved = starts(timeline.moved(nominal))
        assert all(a < b for a, b in itertools.pairwise(moved))


@pytest.mark.parametrize(
    ("every", "step", "length", "expected"),
    [
        (Every(10), 0, 30, 3),
        (Every(10), 10, 30, 3),  # the one at step 10 is about to come
        (Every(10), 11, 30, 2),
        (Every(10), 11, 25, 2),  # 20, and the last step
        (Every(10, first=25), 0, 30, 1),
        (Every(10, first=31), 0, 30, 0),
        (Every(None), 0, 30, 0),
    ],
)
def test_pauses_to_come(every, step, length, expected):
    assert every.within(step, length) == expected


def test_the_longest_run_in_the_time_that_is_left():
    nominal, timeline = plan(2, 8), Timeline(100)
    costs = Costs((1.0, 4.0), [(Every(10), 3.0)])
    assert costs.rest(timeline, nominal, 0) == 20 * 1 + 80 * 4 + 10 * 3
    assert costs.rest(timeline, nominal, 50) == 50 * 4 + 6 * 3
    assert costs.longest(timeline, nominal, 0, 370) == 100
    length = costs.longest(timeline, nominal, 0, 185)
    assert costs.rest(timeline.then(Replan(0, length)), nominal, 0) <= 185
    assert costs.rest(timeline.then(Replan(0, length + 1)), nominal, 0) > 185
    assert costs.longest(timeline, nominal, 50, 0.1) == 51  # it cannot end before its next step
    assert costs.longest(timeline, nominal, 50, 1e9) == 100  # the plan is the upper limit


def test_a_plateaus_stages_stay_where_they_began():
    nominal = plan(2, 8)
    waiting = replace(nominal, stages=tuple(replace(s, patience=1, start=None) for s in nominal.stages)).begin(0, 0)
    timeline = Timeline(100, (Replan(0, 50),))
    assert starts(timeline.moved(waiting)) == [0, None]
    assert Costs((1.0, 4.0)).rest(timeline, waiting, 10) == 40
