"""A comparison over keys and seeds, from a grid to a table.

What is chosen is chosen on the validation split. No run of a comparison measures the test split; at the end it is
measured once, for the row that is best on validation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer.errors import UserError
from hf_transfer.evaluation.metric_table import LOSS
from hf_transfer.files import say
from hf_transfer.inference.predictor import Predictor
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.runs.pricing import price_here
from hf_transfer.studies import table, transfer
from hf_transfer.studies.announcing import announce
from hf_transfer.studies.combining import combine
from hf_transfer.studies.comparison import Comparison, lines_of, write
from hf_transfer.studies.expecting import Expectation
from hf_transfer.studies.grid import Cell, Make, cell_of, why
from hf_transfer.studies.order import Fixed
from hf_transfer.studies.question import WHOLE, Question, cells_asked, open_folder, search_asked
from hf_transfer.studies.running import Outcome, Runner, finished_of, metric_of
from hf_transfer.studies.searching import Pruning, Search
from hf_transfer.studies.statistics import summary
from hf_transfer.studies.table import Line, compared
from hf_transfer.studies.words import check_words, refuse_processes
from hf_transfer.training.pace import exactly


def run_one(question: Question, make: Make, index: int, talks: bool) -> Outcome:
    """Run one cell of a comparison, for a job that is one of several; the table is made by the call without a number.

    Raises:
        UserError: as `answer`; there is no such cell.
    """
    check_words(question.search, question.trials, question.prunes, question.grid, index)
    cells, _ = cells_asked(question, make)
    if not 0 <= index < len(cells):
        raise UserError(f"there are {len(cells)} cells, 0 to {len(cells) - 1}, and no {index}.", key="cell")
    open_folder(question)
    tell = say if talks else _silent
    tell(f"Cell {index} of {len(cells)}: {cells[index].name}")
    outcome = Runner(make, tell).outcome(cells[index])
    tell(f"  failed: {outcome.why_not}" if outcome.results is None else f"  finished: {cells[index].folder}")
    return outcome


def answer(question: Question, make: Make, talks: bool = True) -> Comparison:
    """Run what is not finished yet, and compare.

    Args:
        question: what is compared.
        make: gives the configuration of changed keys.
        talks: whether progress and the table are printed.

    Raises:
        UserError: keys, values or the folder are not right, before anything is run. What goes wrong in a cell is in its
            row.
    """
    refuse_processes()
    began, tell = time.perf_counter(), say if talks else _silent
    check_words(question.search, question.trials, question.prunes, question.grid)
    order: Fixed | Search = (
        Fixed(*cells_asked(question, make)) if question.search is None else search_asked(question, make)
    )
    open_folder(question)
    runner = Runner(make, tell)
    if isinstance(order, Search):
        runner.shared.watchers.append(Pruning(order))
    for line in order.left_out:
        tell(f"Left out: {line}")
    expected = announce(order, question, runner)
    comparison = Comparison(question, left_out=order.left_out, tests=_earlier_tests(question.folder))
    outcomes: dict[str, Outcome] = {}
    cells = list(order.all) if isinstance(order, Fixed) else list[Cell]()
    try:
        for number, cell in order.cells(outcomes):
            if cell.key not in outcomes:
                outcomes[cell.key] = _run(runner, cell, number, expected, order.left)
            if cell not in cells:
                cells.append(cell)
            _fill(comparison, cells, outcomes, make)
            write(comparison)
        if all(one.results is None for one in outcomes.values()):
            tell("No cell has a result.")
        else:
            _compare_with_references(comparison, runner, expected)
            _combine(comparison, make)
            _measure_test(comparison, make, tell)
    except (KeyboardInterrupt, SystemExit):
        tell(f"Interrupted. The same command goes on; what is finished is in {question.folder}.")
        raise
    comparison.seconds = time.perf_counter() - began
    write(comparison)
    for line in lines_of(comparison):
        tell(line)
    return comparison


def _run(runner: Runner, cell: Cell, number: str, expected: Expectation, left: Sequence[str]) -> Outcome:
    """A cell, with a line before and after it; `left` names the rows of the cells after it."""
    if (finished := finished_of(cell)) is not None:
        return finished
    began = time.perf_counter()
    runner.tell(f"{number}  {cell.name}")
    outcome = runner.outcome(cell)
    seconds = time.perf_counter() - began
    expected.note(outcome, seconds)
    rest = expected.line(left)
    rest = f"; left: {rest}" if rest else ""
    took = exactly(seconds)
    if outcome.stopped:
        runner.tell(f"    {outcome.stopped}; took {took}{rest}")
    elif outcome.results is None:
        runner.tell(f"    failed after {took}: {outcome.why_not}{rest}")
    else:
        metric = metric_of(outcome.results, None)
        runner.tell(f"    {metric} {outcome.results['validation_metrics'][metric]:.4f} in {took}{rest}")
    return outcome


def _price(cell: Cell, make: Make) -> float | None:
    """Dollars per hour of a device of this machine, as far as keys or the price file say."""
    args = make({**cell.row.settings, "output_dir": str(cell.folder)}, cell.row.without).training
    return price_here(args, args.device.type)


def _fill(comparison: Comparison, cells: Sequence[Cell], outcomes: Mapping[str, Outcome], make: Make) -> None:
    """The rows of the table from what has been run so far."""
    question = comparison.question
    some = next((one for one in outcomes.values() if one.results is not None), None)
    metric = (question.metric or LOSS) if some is None else metric_of(some.results or {}, question.metric)
    price = None if some is None else _price(some.cell, make)
    by_row: dict[str, list[Outcome]] = {}
    for cell in cells:
        outcome = outcomes.get(cell.key) or Outcome(cell, why_not="not run yet")
        by_row.setdefault(cell.row.name, []).append(outcome)
    comparison.lines = [Line(of[0].cell.row, metric, of, price) for of in by_row.values()]
    compared(comparison.lines)
    draws = question.given.get("data_seed") is None and not any("data_seed" in cell.row.settings for cell in cells)
    comparison.notes = table.notes(comparison.lines, question.seeds, draws)
    comparison.notes += table.notes_of_search(comparison.lines) if question.search is not None else []


# ---- references and the test split ---------------------------------------------------------------------------------


def _compare_with_references(comparison: Comparison, runner: Runner, expected: Expectation) -> None:
    """Run the references of every row, with the budget that its runs came to; of a search those of the best row."""
    done: dict[str, Outcome] = {}
    is_search = comparison.question.search is not None
    for line in comparison.lines:
        if is_search and not line.is_chosen:
            continue
        against = transfer.read_against(comparison.question.against)
        line.verdicts = [_verdict(line, kind, own, runner, expected, done) for kind, own in against.items()]
        comparison.references = list(done.values())
        for one in line.outcomes if line.verdicts else ():
            if one.results is not None:
                transfer.record(one.cell.folder, line.verdicts)
        write(comparison)


def _verdict(
    line: Line, kind: str, own: Mapping[str, Any], runner: Runner, expected: Expectation, done: dict[str, Outcome]
) -> transfer.Verdict:
    """A row against one of its references; `done` gets the references that were run."""
    values: dict[int, float] = {}
    rate: float | None = None
    failed = ""
    for one in line.outcomes:
        if one.results is None:
            failed = failed or f"seed {one.cell.seed} of the row has no result"
            continue
        if transfer.is_itself(one.cell.folder, kind):
            return transfer.Verdict(kind, line.metric, why_not=f"the row is {kind} itself")
        row = transfer.reference_of(line.row, kind, own, transfer.budget_in(one.cell.folder))
        cell = cell_of(row, one.cell.seed, runner.make, one.cell.folder.parents[1])
        if cell.key not in done:
            done[cell.key] = _run(runner, cell, "reference", expected, ())
        outcome = done[cell.key]
        value = outcome.value(line.metric)
        if value is None:
            failed = failed or f"seed {cell.seed} of the reference has no result: {outcome.why_not}"
            continue
        values[cell.seed] = value
        rate = transfer.learning_rate_in(cell.folder)
    return transfer.judge(kind, line.metric, line.values, values, failed, rate)


def _combine(comparison: Comparison, make: Make) -> None:
    """A soup or an ensemble of all runs, if it was asked for."""
    way, lines = comparison.question.combine, comparison.lines
    if way is None:
        return
    ended = [one.cell for line in lines for one in line.outcomes if one.results is not None]
    config = make({**ended[0].row.settings, "output_dir": str(ended[0].folder)}, ended[0].row.without)
    try:
        with quiet_libraries(config.training):
            folders = [cell.folder for cell in ended]
            comparison.combined = combine(way, folders, comparison.question.folder, lines[0].metric)
    except UserError as error:
        comparison.combined = {"way": way, "why_not": why(error)}


def _earlier_tests(folder: Path) -> list[dict[str, Any]]:
    """Measurements of the test split by an earlier call."""
    path = folder / WHOLE
    if not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    return [*before["earlier_tests"], *([before["test"]] if before["test"] else [])]


def _measure_test(comparison: Comparison, make: Make, tell: Any) -> None:
    """Measure the test split for the chosen row, unless that has been done."""
    line = comparison.chosen
    assert line is not None, "some cell has a result"
    outcomes = [one for one in line.outcomes if one.results is not None]
    if "test" not in outcomes[0].results["data_facts"]["splits"]:  # type: ignore[index]
        comparison.notes.append(
            "There is no test split: the best row was chosen on the split that it was measured on, and its metric is "
            "somewhat optimistic."
        )
        return
    keys = {str(one.cell.seed): one.cell.key for one in outcomes}
    same = [one for one in comparison.tests if one["cells"] == keys]
    comparison.tests = [one for one in comparison.tests if one["cells"] != keys]
    if same:
        comparison.tests.append(same[-1])
    else:
        tell(f"Measuring the test split for {line.row.name}.")
        metrics = {str(one.cell.seed): _on_test(one.cell, make) for one in outcomes}
        found = summary([m[line.metric] for m in metrics.values() if m.get(line.metric) is not None])
        measured = {"row": line.row.name, "cells": keys, "metric": line.metric, "metrics": metrics}
        comparison.tests.append({**measured, "mean": found and found.mean, "interval": found and found.interval})
    if len(comparison.tests) > 1:
        comparison.notes.append(
            f"The test split has been measured for {len(comparison.tests)} choices of this comparison, the last of "
            "which is shown: the more often it is asked, the less it says."
        )


def _on_test(cell: Cell, make: Make) -> dict[str, float]:
    """Metrics of a finished cell on the test split."""
    config = make({**cell.row.settings, "seed": cell.seed, "output_dir": str(cell.folder)}, cell.row.without)
    trusted = {name: True for name in ("trust_remote_code", "allow_pickle") if getattr(config.model, name)}
    with quiet_libraries(config.training):
        predictor = Predictor.load(cell.folder, **trusted)
        if config.data.in_memory is not None:  # no file says where it is
            predictor = replace(predictor, data=replace(predictor.data, in_memory=config.data.in_memory))
        return dict(predictor.evaluate(split="test")["metrics"])


def _silent(text: str = "") -> None:
    """Say nothing."""
