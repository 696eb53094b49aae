"""What came of a comparison: its table, picture, frame and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_transfer.files import write_bytes, write_json, write_text
from hf_transfer.report import comparison as page
from hf_transfer.report import row_curves, search_plot
from hf_transfer.report.cost_plot import Point, draw
from hf_transfer.report.search_plot import Dot
from hf_transfer.run_folder import REPORT
from hf_transfer.studies import table, transfer
from hf_transfer.studies.question import CURVES, DOTS, PICTURE, SHEET, TABLE, WHOLE, Question
from hf_transfer.studies.running import Outcome
from hf_transfer.studies.table import NUMBERS, Line


@dataclass
class Comparison:
    """What came of it.

    Attributes:
        question: that was asked.
        lines: the rows.
        references: outcomes of the runs that rows were compared with, by row and name.
        left_out: contradictory rows, with the reasons.
        tests: measurements of the test split, the newest last.
        combined: what a soup or ensemble of the runs came to; None if none was asked for.
        seconds: of the whole, in this process.
        notes: what to know to read the table.
    """

    question: Question
    lines: list[Line] = field(default_factory=list)
    references: list[Outcome] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    combined: dict[str, Any] | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> Line | None:
        """The row that is best on validation."""
        return next((line for line in self.lines if line.is_chosen), None)

    @property
    def failures(self) -> list[str]:
        """A line for each run without a result, references included."""
        of_rows = [
            f"{line.row.name}, seed={seed}: {said}" for line in self.lines for seed, said in line.failures.items()
        ]
        of_rows += [f"{one.cell.name}: {one.why_not}" for one in self.references if one.results is None]
        why_not = (self.combined or {}).get("why_not")
        return of_rows + ([f"{self.question.combine}: {why_not}"] if why_not else [])

    @property
    def hurt(self) -> list[str]:
        """The rows that pretraining or tuning hurt, with what they were compared with."""
        return [
            f"{line.row.name} (against {one.against})"
            for line in self.lines
            for one in line.verdicts
            if one.verdict == transfer.HURT
        ]

    def frame(self) -> Any:
        """The rows as a pandas frame; `frame.attrs` has the folder, the chosen row, the test results and the notes."""
        import pandas as pd

        frame = pd.DataFrame([line.flat() for line in self.lines])
        frame = frame.astype(dict.fromkeys(NUMBERS, float))  # what is not known is NaN
        frame.attrs = {
            "output_dir": str(self.question.folder),
            "chosen": self.chosen and self.chosen.row.name,
            "cells": {line.row.name: [str(one.cell.folder) for one in line.outcomes] for line in self.lines},
            "test": self.tests[-1] if self.tests else None,
            "combined": self.combined,
            "failures": self.failures,
            "notes": self.notes,
        }
        return frame

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.lines[0].metric if self.lines else None,
            "is_search": self.question.search is not None,
            "seeds": list(self.question.seeds),
            "rows": [line.to_dict() for line in self.lines],
            "chosen": self.chosen and self.chosen.row.name,
            "test": self.tests[-1] if self.tests else None,
            "earlier_tests": self.tests[:-1],
            "combined": self.combined,
            "references": [
                {"name": one.cell.name, "cell": one.cell.key, "why_not": one.why_not} for one in self.references
            ],
            "left_out": self.left_out,
            "failures": self.failures,
            "notes": self.notes,
        }


# ---- what is written and said --------------------------------------------------------------------------------------


def write(comparison: Comparison) -> None:
    """The table, the sheet, the pictures, everything as JSON, and the page that is made of it."""
    folder, lines = comparison.question.folder, comparison.lines
    write_json(folder / WHOLE, comparison.to_dict())
    write_text(folder / SHEET, table.as_csv(lines))
    text = ["# Comparison", "", *table.as_markdown(lines), "", *(f"- {note}" for note in _said_after(comparison))]
    write_text(folder / TABLE, "\n".join(text) + "\n")
    shown = [line for line in lines if line.summary is not None]
    is_paid = all(line.usd is not None for line in shown)
    if points := [_point(line, is_paid) for line in shown]:
        chosen = comparison.chosen
        along = "dollars per run" if is_paid else "seconds of training"
        mark = chosen.row.name if chosen else ""
        write_bytes(folder / PICTURE, draw(points, along, lines[0].metric, mark))
        curves = {line.row.name: curve for line in lines if len(curve := line.curve) > 1}
        if curves:
            write_bytes(folder / CURVES, row_curves.draw(curves, lines[0].metric, mark))
    if comparison.question.search is not None and (dots := [dot for line in lines if (dot := _dot(line)) is not None]):
        write_bytes(folder / DOTS, search_plot.draw(dots, lines[0].metric))
    page.write(folder)


def _dot(line: Line) -> Dot | None:
    """A trial; None of the run as given, and of a trial that says nothing."""
    found, curve = line.summary, line.curve
    value = found.mean if found is not None else curve[max(curve)] if curve else None
    if value is None or not line.row.settings:
        return None
    return Dot(line.row.settings, value, bool(line.stopped), line.is_chosen)


def _point(line: Line, is_paid: bool) -> Point:
    found, cost = line.summary, line.usd if is_paid else line.mean("train_seconds")
    assert found is not None and cost is not None
    return Point(line.row.name, cost, found.mean, found.interval)


def lines_of(comparison: Comparison) -> list[str]:
    """For a terminal."""
    folder = comparison.question.folder
    files = ", ".join(
        name for name in (REPORT, TABLE, SHEET, WHOLE, PICTURE, CURVES, DOTS) if (folder / name).is_file()
    )
    return ["", *table.as_text(comparison.lines), "", *_said_after(comparison), f"Files in {folder}: {files}, cells/"]


def _said_after(comparison: Comparison) -> list[str]:
    """Verdicts, the chosen row and its test results, failures, notes."""
    said = [one.line(line.row.name) for line in comparison.lines for one in line.verdicts]
    if (chosen := comparison.chosen) is not None:
        said.append(f"Best on validation: {chosen.row.name}.")
    if comparison.tests:
        test = comparison.tests[-1]
        low_high = test["interval"]
        interval = f" (95% CI over seeds {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
        said.append(f"Test split, {test['row']} alone: {test['metric']} {test['mean']:.4f}{interval}.")
    if (combined := comparison.combined) is not None and "value" in combined:
        where = f" in {combined['folder']}" if "folder" in combined else ""
        said.append(
            f"{combined['way'].capitalize()} of {combined['runs']} runs{where}: {combined['metric']} "
            f"{combined['value']:.4f} on validation; the best single run has {combined['best_single']:.4f}."
        )
    said += [f"Left out: {line}" for line in comparison.left_out]
    said += [f"Failed: {line}" for line in comparison.failures]
    return [*said, *comparison.notes]
