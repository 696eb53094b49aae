"""What the rest of a comparison is expected to take, once some of it has been run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_transfer.runs.estimating import Estimate
from hf_transfer.studies.expecting import Expectation
from hf_transfer.studies.grid import Cell, Row
from hf_transfer.studies.running import Outcome


def ended(row: str, train_seconds: float) -> Outcome:
    return Outcome(Cell(Row({}, of=row), 0, "key", Path("cell")), {"train_seconds": train_seconds})


def test_what_is_the_same_for_short_and_long_runs_is_corrected_apart_from_training():
    rows = {"short": Estimate(1.0, 2.0, None), "long": Estimate(1.0, 100.0, None), "broken": None}
    found = Expectation(rows)
    assert found.seconds(["short", "long"]) == 1 + 2 + 1 + 100
    assert found.seconds(["broken"]) == found.seconds(["new"]) == (3 + 101) / 2
    found.note(ended("short", 4.0), taken=11.0)  # 7 s besides, and training takes twice as long
    assert found.seconds(["short", "long"]) == pytest.approx(7 + 4 + 7 + 200)
    found.note(Outcome(ended("long", 0.0).cell, why_not="it failed"), taken=1.0)
    assert found.seconds(["long"]) == pytest.approx(207)


def test_a_trial_tells_of_the_others():
    found = Expectation({"as given": Estimate(1.0, 10.0, 3600.0)})
    found.note(ended("learning_rate=0.001", 5.0), taken=7.0)
    assert found.seconds(["", ""]) == pytest.approx(2 * (2 + 5)) and found.line([""]) == "about 7 s and $7"


def test_a_head_that_is_solved_for_has_its_whole_time_beside_training():
    found = Expectation({"row": Estimate(1.0, None, None)})
    found.note(ended("row", 3.0), taken=5.0)
    assert found.seconds(["row"]) == 5.0
