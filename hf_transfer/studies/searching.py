"""A search: trials one after another, each chosen from what the ones before came to.

What is kept is the values of every trial (`search.json`); everything else is read from the folders of the runs, so that
the same command goes on wherever it was interrupted, with the proposals of an uninterrupted search.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_transfer.errors import UserError
from hf_transfer.evaluation.metric_table import LOSS, METRIC_TABLE
from hf_transfer.files import write_json
from hf_transfer.studies.grid import Cell, Make, Row, cells_of, possible
from hf_transfer.studies.history import WHOLE, by_epoch
from hf_transfer.studies.running import Outcome, Stopped, metric_of
from hf_transfer.studies.sampling import Told, is_hopeless, propose
from hf_transfer.studies.space import Choices, Space

TRIALS = "search.json"
BASE = Row({})  # the run without what is searched


@dataclass
class Search:
    """The cells of a search, in the order in which they are run.

    Attributes:
        space: what each key may be.
        trials: number of them, next to the run as given.
        seeds: of every trial.
        make: gives the configuration of changed keys.
        folder: of the comparison.
        metric: that was asked for; None for the one that such runs are judged by.
        prunes: whether a trial is stopped whose first seed is worse than the median of the trials before.
        skips: whether trials whose keys contradict each other are left out.
        first: rows that are run before the first trial.
        left: names of the rows that are still to be run, once for each cell; trials are not known before they begin.
        left_out: a line for each trial that was left out.
    """

    space: Space
    trials: int
    seeds: Sequence[int]
    make: Make
    folder: Path
    metric: str | None = None
    prunes: bool = True
    skips: bool = False
    first: Sequence[Row] = ()
    left: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _told: list[Told] = field(default_factory=list)
    _running: Told | None = None
    _decides: str | None = None  # the metric, once a run has ended

    def __post_init__(self) -> None:
        begun = self.begun * len(self.seeds)
        self.left = [""] * ((self.trials + len(self.first)) * len(self.seeds) - begun)

    def cells(self, outcomes: MutableMapping[str, Outcome]) -> Iterator[tuple[str, Cell]]:
        """(number, run) of what is to be run next. The caller puts what came of it into `outcomes`."""
        total = self.trials * len(self.seeds)
        for row in self.first:
            for cell in cells_of([row], self.seeds, self.make, self.folder):
                self.left = [""] * total
                yield "first", cell
                self._metric(outcomes[cell.key])
        for number in range(self.trials):
            settings = self._settings(number)
            if settings is None:
                break
            self.left = [""] * (total - number * len(self.seeds) - 1)
            yield from self._trial(number, settings, outcomes)
        self.left, self._running = [], None

    @property
    def begun(self) -> int:
        """Number of trials whose values are kept already."""
        return min(len(self._kept()), self.trials)

    def _trial(
        self, number: int, settings: dict[str, Any], outcomes: MutableMapping[str, Outcome]
    ) -> Iterator[tuple[str, Cell]]:
        """The cells of a trial; the rest are left out where the first is stopped."""
        row = Row(settings)
        try:
            possible([row], self.make, self.seeds[0], skips=False)
        except UserError as error:
            if self.skips:
                self.left_out.append(f"{row.name}: {error}")
            else:
                cell = Cell(row, self.seeds[0], f"trial-{number}", self.folder / "cells" / f"trial-{number}")
                outcomes[cell.key] = Outcome(cell, why_not=str(error))
                yield f"trial {number + 1}/{self.trials}", cell
            self._told.append(Told(settings))
            return
        values, of_first, stopped = list[float | None](), dict[int, float](), False
        for nth, cell in enumerate(cells_of([row], self.seeds, self.make, self.folder)):
            self._running = Told(settings) if nth == 0 and self.prunes else None
            yield f"trial {number + 1}/{self.trials}", cell
            outcome = outcomes[cell.key]
            metric = self._metric(outcome)
            values.append(outcome.value(metric))
            if nth == 0:
                of_first = by_epoch(cell.folder, metric)
            if stopped := bool(outcome.stopped):
                break
        self._running = None
        known = [value for value in values if value is not None and math.isfinite(value)]
        mean = sum(known) / len(known) if len(known) == len(self.seeds) else None
        self._told.append(Told(settings, mean, of_first, stopped))

    def judge(self, folder: Path) -> None:
        """Called after an evaluation of a run.

        Args:
            folder: of the run.

        Raises:
            Stopped: it is the first seed of a trial that is hopeless.
        """
        if self._running is None:
            return
        metric = self._metric(None)
        now = by_epoch(folder, metric)
        if not now:
            return
        running = Told(self._running.settings, by_epoch=now)
        if is_hopeless(self.space, self._told, running, METRIC_TABLE[metric].greater_is_better):
            best = (max if METRIC_TABLE[metric].greater_is_better else min)(now.values())
            epoch = max(now)
            raise Stopped(
                f"stopped after epoch {epoch}: {metric} {best:.4f} is worse than the median of the trials before"
            )

    def _metric(self, outcome: Outcome | None) -> str:
        """The metric that decides; before any run has ended, the loss stands in for one that was not named."""
        if outcome is not None and outcome.results is not None:
            self._decides = metric_of(outcome.results, self.metric)
        return self._decides or self.metric or LOSS

    def _settings(self, number: int) -> dict[str, Any] | None:
        """The values of a trial: those of an earlier call, or a proposal, which is kept before it is run."""
        kept = self._kept()
        if number < len(kept):
            return {name: _as_given(self.space, name, value) for name, value in kept[number].items()}
        greater = METRIC_TABLE[self._metric(None)].greater_is_better
        found = propose(self.space, self._told, greater, self.seeds[0])
        if found is not None:
            write_json(self.folder / TRIALS, {"trials": [*kept, found]})
        return found

    def _kept(self) -> list[dict[str, Any]]:
        path = self.folder / TRIALS
        return json.loads(path.read_text(encoding="utf-8"))["trials"] if path.is_file() else []


def _as_given(space: Space, name: str, value: Any) -> Any:
    """A value of JSON as the space has it."""
    one = space[name]
    if isinstance(one, Choices):
        return next((own for own in one.values if json.dumps(own) == json.dumps(value)), value)
    return value


class Pruning(TrainerCallback):
    """Lets a search look at every evaluation during training."""

    def __init__(self, search: Search) -> None:
        self.search, self._trains = search, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trains = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trains = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises:
        Stopped: the run is hopeless.
        """
        if self._trains and state.epoch is not None and abs(state.epoch - round(state.epoch)) < WHOLE:
            last = state.epoch >= state.num_train_epochs - WHOLE
            if not last:  # what has ended anyway is kept
                self.search.judge(Path(str(args.output_dir)))


def space_rows(space: Space) -> list[Row]:
    """Rows that have every end and choice of every key once: what can be checked before anything is run."""
    middle = {name: one.ends[0] for name, one in space.items()}
    rows = [Row({**middle, name: value}) for name, one in space.items() for value in one.ends]
    return list({row.name: row for row in rows}.values())


def base_rows(make: Make, seed: int, space: Space) -> list[Row]:
    """The run as given, if it can be without what is searched."""
    try:
        possible([BASE], make, seed, skips=False)
    except UserError:
        return []
    return [BASE]
