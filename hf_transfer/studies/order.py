"""The cells of a grid, in the order in which they are run; `searching.Search` has those of a search."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

from hf_transfer.studies.grid import Cell
from hf_transfer.studies.running import Outcome, finished_of


@dataclass
class Fixed:
    """The cells of a grid.

    Attributes:
        all: of them.
        left_out: a line for each contradictory row.
        left: names of the rows that are still to be run, once for each cell.
    """

    all: Sequence[Cell]
    left_out: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = self._from(0)

    def cells(self, outcomes: MutableMapping[str, Outcome]) -> Iterator[tuple[str, Cell]]:
        """(number, run) of what is next. The caller puts what came of it into `outcomes`, unless it stands there."""
        for number, cell in enumerate(self.all):
            self.left = self._from(number + 1)
            yield f"{number + 1}/{len(self.all)}", cell

    def _from(self, number: int) -> list[str]:
        return [cell.row.name for cell in self.all[number:] if finished_of(cell) is None]
