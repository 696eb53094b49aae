"""What a comparison is expected to take, before it starts and while it runs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_transfer.errors import UserError
from hf_transfer.runs.estimating import Estimate, estimate
from hf_transfer.runs.shared import Shared
from hf_transfer.studies.grid import Cell, Make, Row
from hf_transfer.training.pace import spell


@dataclass
class Expectation:
    """Seconds and dollars of the cells that are still to be run.

    Attributes:
        of_rows: of a run, by name of the row; None where a row could not be prepared.
        expected: seconds that the cells so far were expected to take.
        taken: seconds that they took.
    """

    of_rows: dict[str, Estimate | None] = field(default_factory=dict)
    expected: float = 0.0
    taken: float = 0.0

    @property
    def usd_per_hour(self) -> float | None:
        """Dollars per hour of the devices; None if their price is not known."""
        return next((one.usd_per_hour for one in self.of_rows.values() if one is not None), None)

    def seconds(self, cells: Sequence[Cell]) -> float:
        """What the cells will take, corrected by what others took; a row that is not known counts as the mean."""
        known = [one.seconds for one in self.of_rows.values() if one is not None]
        mean = sum(known) / len(known) if known else math.nan
        scale = self.taken / self.expected if self.expected > 0 else 1.0
        found = [self.of_rows.get(cell.row.name) for cell in cells]
        return scale * sum(mean if one is None else one.seconds for one in found)

    def note(self, cell: Cell, began: float) -> None:
        """A cell has been run since the time `began`."""
        one = self.of_rows.get(cell.row.name)
        if one is not None:
            self.expected += one.seconds
            self.taken += time.perf_counter() - began

    def line(self, cells: Sequence[Cell]) -> str:
        """What these cells take, in words; empty if nothing is known."""
        return in_words(self.seconds(cells), self.usd_per_hour)


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
