"""The runs of a comparison, one after another; finished ones are kept, interrupted ones go on from their checkpoint."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_transfer.errors import UserError, nearest
from hf_transfer.evaluation.metric_table import LEADING, METRIC_TABLE
from hf_transfer.files import write_json
from hf_transfer.run_folder import RESULTS
from hf_transfer.runs.run import run
from hf_transfer.runs.shared import Shared
from hf_transfer.studies.grid import Cell, Make, why
from hf_transfer.training import checkpoints

STOPPED = "stopped.json"  # in the folder of a run that a search has stopped


class Stopped(Exception):
    """A run need not go on; says why."""


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        cell: the run.
        results: what its `results.json` holds; None if it has none.
        why_not: why there are none; empty if there are, or if nobody has tried.
        stopped: why a search has stopped it; empty if none has.
    """

    cell: Cell
    results: Mapping[str, Any] | None = None
    why_not: str = ""
    stopped: str = ""

    def value(self, metric: str) -> float | None:
        """A metric on the validation split; None without one."""
        found = None if self.results is None else self.results["validation_metrics"].get(metric)
        return None if found is None else float(found)


@dataclass
class Runner:
    """Runs cells.

    Attributes:
        make: gives the configuration of changed keys.
        tell: says a line.
        shared: data and features that the runs share.
    """

    make: Make
    tell: Callable[[str], None]
    shared: Shared = field(default_factory=Shared)

    def outcome(self, cell: Cell) -> Outcome:
        """What a cell came to: at once if it is finished, else by running it.

        Everything that goes wrong in it is its reason why not; a signal ends the comparison.
        """
        finished = finished_of(cell)
        if finished is not None:
            return finished
        try:
            run(self.make({**cell.row.settings, **self._place(cell), "seed": cell.seed}, cell.row.without), self.shared)
        except Stopped as error:
            write_json(cell.folder / STOPPED, {"why": str(error)})
            for checkpoint in cell.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
            return Outcome(cell, stopped=str(error))
        except Exception as error:
            return Outcome(cell, why_not=why(error))
        finally:  # the model, before the next one is loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        found = finished_of(cell)
        return found or Outcome(cell, why_not=f"it left no {RESULTS}")

    def _place(self, cell: Cell) -> dict[str, Any]:
        """Where it is written, and whether it goes on from a checkpoint or starts again."""
        keys: dict[str, Any] = {"output_dir": str(cell.folder)}
        if resumable(cell.folder):
            return {**keys, "resume_from_checkpoint": "auto"}
        return {**keys, "overwrite_output_dir": cell.folder.exists()}


def finished_of(cell: Cell) -> Outcome | None:
    """What a finished or stopped cell came to; None if it is neither."""
    path, stopped = cell.folder / RESULTS, cell.folder / STOPPED
    if path.is_file():
        return Outcome(cell, json.loads(path.read_text(encoding="utf-8")))
    if stopped.is_file():
        return Outcome(cell, stopped=json.loads(stopped.read_text(encoding="utf-8"))["why"])
    return None


def resumable(folder: Path) -> bool:
    """Whether a run can go on from a checkpoint in its folder."""
    return checkpoints.newest_valid(folder)[0] is not None


def metric_of(results: Mapping[str, Any], wanted: str | None) -> str:
    """The metric that decides: the wanted one, or that which a run of this problem type is judged by.

    Raises:
        UserError: runs have no such metric.
    """
    metric = wanted or LEADING[results["problem_type"]][0]
    if metric not in results["validation_metrics"]:
        available = ", ".join(results["validation_metrics"])
        raise UserError(f"{metric!r} is not one of {available}.", key="metric")
    return metric


def check_metric(wanted: str | None) -> None:
    """Check the name of a metric before anything is run.

    Raises:
        UserError: no run has it.
    """
    if wanted is not None and wanted not in METRIC_TABLE:
        raise UserError(f"{wanted!r} is not a metric.{nearest(wanted, METRIC_TABLE)}", key="metric")
