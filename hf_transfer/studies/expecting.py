"""What a comparison is expected to take, before it starts and while it runs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_transfer.errors import UserError
from hf_transfer.runs.estimating import Estimate, estimate
from hf_transfer.runs.shared import Shared
from hf_transfer.studies.grid import Make, Row
from hf_transfer.studies.running import Outcome
from hf_transfer.training.pace import spell


@dataclass
class Expectation:
    """Seconds and dollars of the cells that are still to be run.

    Attributes:
        of_rows: of a run, by name of the row; None where a row could not be prepared.
        expected: seconds of training that the cells so far were expected to take.
        trained: seconds of training that they took.
        beside: seconds that each of them took besides: loading, checks, evaluations at the end, saving.
    """

    of_rows: dict[str, Estimate | None] = field(default_factory=dict)
    expected: float = 0.0
    trained: float = 0.0
    beside: list[float] = field(default_factory=list)

    @property
    def usd_per_hour(self) -> float | None:
        """Dollars per hour of the devices; None if their price is not known."""
        return next((one.usd_per_hour for one in self.of_rows.values() if one is not None), None)

    def seconds(self, rows: Sequence[str]) -> float:
        """What runs of rows with these names will take, corrected by what others took.

        A row that is not known counts as the mean. Before a cell has ended it is too little by what follows training.
        """
        each = {name: self._of_run(one) for name, one in self.of_rows.items() if one is not None}
        mean = sum(each.values()) / len(each) if each else math.nan
        return sum(each.get(name, mean) for name in rows)

    def _of_run(self, one: Estimate) -> float:
        """What is the same for short runs and long ones is corrected apart from training."""
        scale = self.trained / self.expected if self.expected > 0 else 1.0
        beside = sum(self.beside) / len(self.beside) if self.beside else one.preparing
        return beside + scale * (one.training or 0.0)

    def note(self, outcome: Outcome, taken: float) -> None:
        """A cell has been run in `taken` seconds; one without a result says nothing."""
        if outcome.results is None:
            return
        one = self.of_rows.get(outcome.cell.row.name)
        if one is None and len(self.of_rows) == 1:  # of a search
            (one,) = self.of_rows.values()
        if one is None:
            return
        trained = 0.0 if one.training is None else min(float(outcome.results["train_seconds"]), taken)
        self.expected += one.training or 0.0
        self.trained += trained
        self.beside.append(taken - trained)

    def line(self, rows: Sequence[str]) -> str:
        """What runs of rows with these names take, in words; empty if nothing is known."""
        return in_words(self.seconds(rows), self.usd_per_hour) if rows else ""


def in_words(seconds: float, usd_per_hour: float | None) -> str:
    """Time and money; empty if the time is not known."""
    if not math.isfinite(seconds):
        return ""
    money = "" if usd_per_hour is None else f" and ${seconds / 3600 * usd_per_hour:.2g}"
    return f"about {spell(seconds)}{money}"


def expect(rows: Sequence[Row], make: Make, seed: int, shared: Shared) -> tuple[Expectation, Mapping[str, str]]:
    """(what a run of each row takes, why a row cannot be run).

    Args:
        rows: to prepare and time, one after another; nothing is trained.
        make: gives the configuration of changed keys.
        seed: of the runs.
        shared: data and features that the runs share.
    """
    found, problems = Expectation(), dict[str, str]()
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = make({**row.settings, "seed": seed, "output_dir": folder}, row.without)
                found.of_rows[row.name] = estimate(config, shared)
            except UserError as error:
                found.of_rows[row.name], problems[row.name] = None, str(error)
    return found, problems
