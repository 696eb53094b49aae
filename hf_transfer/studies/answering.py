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
from hf_transfer.studies.combining import combine
from hf_transfer.studies.comparison import Comparison, lines_of, write
from hf_transfer.studies.expecting import Expectation, expect
from hf_transfer.studies.grid import Cell, Make, cell_of, why
from hf_transfer.studies.question import WHOLE, Question, cells_asked, open_folder
from hf_transfer.studies.running import Outcome, Runner, finished_of, metric_of
from hf_transfer.studies.statistics import summary
from hf_transfer.studies.table import Line, compared
from hf_transfer.training.pace import exactly


def run_one(question: Question, make: Make, index: int, talks: bool) -> Outcome:
    """Run one cell of a comparison, for a job that is one of several; the table is made by the call without a number.

    Raises:
        UserError: as `answer`; there is no such cell.
    """
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
    began, tell = time.perf_counter(), say if talks else _silent
    cells, left_out = cells_asked(question, make)
    open_folder(question)
    runner = Runner(make, tell)
    for line in left_out:
        tell(f"Left out: {line}")
    expected = _announce(question, runner, cells)
    comparison = Comparison(question, left_out=left_out, tests=_earlier_tests(question.folder))
    outcomes: dict[str, Outcome] = {}
    price = _price(cells[0], make)
    try:
        for number, cell in enumerate(cells):
            outcomes[cell.key] = _run(runner, cell, f"{number + 1}/{len(cells)}", expected, cells[number + 1 :])
            _fill(comparison, cells, outcomes, price)
            write(comparison)
        if all(one.results is None for one in outcomes.values()):
            tell("No cell has a result.")
        else:
            _compare_with_references(comparison, runner, expected)
            _combine(comparison)
            _measure_test(comparison, make, tell)
    except (KeyboardInterrupt, SystemExit):
        tell(f"Interrupted. The same command goes on; what is finished is in {question.folder}.")
        raise
    comparison.seconds = time.perf_counter() - began
    write(comparison)
    for line in lines_of(comparison):
        tell(line)
    return comparison


def _announce(question: Question, runner: Runner, cells: Sequence[Cell]) -> Expectation:
    """Say what there is to do, and how long it takes."""
    rows = {cell.row.name: cell.row for cell in cells}
    left = [cell for cell in cells if finished_of(cell) is None]
    done = f", {len(cells) - len(left)} of them finished" if len(left) < len(cells) else ""
    more = f", and as many for each of {', '.join(question.against)}" if question.against else ""
    count = f"{len(rows)} row{'' if len(rows) == 1 else 's'}, seed{'' if len(question.seeds) == 1 else 's'}"
    runner.tell(f"{len(cells)} cells ({count} {', '.join(map(str, question.seeds))}){done}{more}.")
    if len(question.seeds) == 1 and question.against:
        runner.tell("One seed gives no interval, and so no verdict: give several seeds.")
    if not question.expects or not left:
        return Expectation()
    wanted = {cell.row.name: cell.row for cell in left}
    expected, problems = expect(list(wanted.values()), runner.make, question.seeds[0], runner.shared)
    for name, said in problems.items():
        runner.tell(f"Cannot be prepared: {name}: {said}")
    unknown = [name for name, one in expected.of_rows.items() if one is not None and one.training is None]
    if line := expected.line(left):
        without = f"; without the training of {', '.join(unknown)}, whose time is not known" if unknown else ""
        beside = ", without the references" if question.against else ""
        runner.tell(
            f"Expected: {line} of loading and training{beside}, from a timed batch of every stage{without}. It is "
            "corrected by what the cells take."
        )
    return expected


def _run(runner: Runner, cell: Cell, number: str, expected: Expectation, after: Sequence[Cell]) -> Outcome:
    """A cell, with a line before and after it."""
    if (finished := finished_of(cell)) is not None:
        return finished
    began = time.perf_counter()
    runner.tell(f"{number}  {cell.name}")
    outcome = runner.outcome(cell)
    expected.note(cell, began)
    left = [one for one in after if finished_of(one) is None]
    rest = expected.line(left) if left else ""
    rest = f"; left: {rest}" if rest else ""
    took = exactly(time.perf_counter() - began)
    if outcome.results is None:
        runner.tell(f"    failed after {took}: {outcome.why_not}{rest}")
    else:
        metric = metric_of(outcome.results, None)
        runner.tell(f"    {metric} {outcome.results['validation_metrics'][metric]:.4f} in {took}{rest}")
    return outcome


def _price(cell: Cell, make: Make) -> float | None:
    """Dollars per hour of a device of this machine, as far as keys or the price file say."""
    args = make({**cell.row.settings, "output_dir": str(cell.folder)}, cell.row.without).training
    return price_here(args, args.device.type)


def _fill(comparison: Comparison, cells: Sequence[Cell], outcomes: Mapping[str, Outcome], price: float | None) -> None:
    """The rows of the table from what has been run so far."""
    question = comparison.question
    some = next((one.results for one in outcomes.values() if one.results is not None), None)
    metric = (question.metric or LOSS) if some is None else metric_of(some, question.metric)
    by_row: dict[str, list[Outcome]] = {}
    for cell in cells:
        outcome = outcomes.get(cell.key) or Outcome(cell, why_not="not run yet")
        by_row.setdefault(cell.row.name, []).append(outcome)
    comparison.lines = [Line(of[0].cell.row, metric, of, price) for of in by_row.values()]
    compared(comparison.lines)
    draws = question.given.get("data_seed") is None and "data_seed" not in question.grid
    comparison.notes = table.notes(comparison.lines, question.seeds, draws)


# ---- references and the test split ---------------------------------------------------------------------------------


def _compare_with_references(comparison: Comparison, runner: Runner, expected: Expectation) -> None:
    """Run the references of every row, with the budget that its runs came to, and judge."""
    done: dict[str, Outcome] = {}
    for line in comparison.lines:
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


def _combine(comparison: Comparison) -> None:
    """A soup or an ensemble of all runs, if it was asked for."""
    way, lines = comparison.question.combine, comparison.lines
    if way is None:
        return
    folders = [one.cell.folder for line in lines for one in line.outcomes if one.results is not None]
    try:
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
