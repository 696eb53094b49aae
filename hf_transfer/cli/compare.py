"""`hf-transfer compare`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import check_run, read_run, run_keys, run_parser
from hf_transfer.config.fields import Key, setting
from hf_transfer.config.values import coerce
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.studies.space import read_space
from hf_transfer.studies.words import check_words, refuse_processes

HELP = (
    "Fine-tune with every combination of values and every seed, one run after another, and compare: a table with 95% "
    "intervals over the seeds, paired differences to the first row, time and cost. What is finished is kept; the same "
    "command goes on where it was interrupted. The test split is measured once, for the row that is best on validation."
)
_SEED = 42  # of a run that is given none
_PLACES = ("model_name_or_path", "dataset_name", "train_file", "validation_file", "test_file")


@dataclass
class CompareArguments:
    """What is compared."""

    grid: dict[str, Any] | list[Any] | None = setting(
        None,
        "values by key, every combination of which is a row: '{strategy: [linear-probe, full], learning_rate: [1e-5, "
        "1e-4]}'; or the rows: '[{}, {strategy: full}]'",
    )
    seeds: list[int] | int | None = setting(None, "seeds that every row is run with, such as 0,1,2 (default: seed)")
    against: list[str] | dict[str, Any] | None = setting(
        None,
        "scratch, linear-probe: the same budget from random weights or frozen features, to judge whether pretraining "
        "helped; a reference may have keys of its own: '{scratch: {learning_rate: 1e-3}}'",
    )
    search: str | dict[str, Any] | None = setting(
        None,
        "instead of a grid, ranges or choices by key, from which optuna draws: '{learning_rate: [1e-5, 1e-3, log], "
        "lora_r: [4, 8, 16]}'; auto: the keys that matter for the strategy",
    )
    trials: int | None = setting(None, "search: number of trials (default: 20), each with all seeds", above=0)
    prune: bool = setting(
        True, "search: stop trials that are worse than the median of earlier ones after as many epochs"
    )
    strict: bool = setting(False, "exit code 1 where pretraining hurt")
    metric: str | None = setting(
        None, "validation metric that decides (default: accuracy, f1_micro or rmse, by problem type)"
    )
    combine: str | None = setting(
        None,
        "combine all runs, on validation: a greedy soup of their weights, or their mean answer",
        choices=("soup", "ensemble"),
    )
    max_cells: int = setting(200, "most runs", above=0)
    skip_contradictions: bool = setting(False, "leave out rows whose keys contradict each other")
    estimate: bool = setting(True, "estimate time and cost before the start; takes some seconds for each row")
    cell: int | None = setting(
        None,
        "run only the cell of this number, from 0, as one of several jobs; without it, the table is made",
        minimum=0,
    )


def parser() -> argparse.ArgumentParser:
    return run_parser("compare", HELP, CompareArguments)


def keys() -> dict[str, Key]:
    return run_keys("compare", CompareArguments)


def run(argv: Sequence[str]) -> int:
    """Compare runs."""
    from hf_transfer.keys import NEEDS

    refuse_processes()
    file, given, values, problems = read_run("compare", argv, parser(), CompareArguments)
    values |= _own_of_file(file, values, problems)
    folder = {**file, **given}.get("output_dir")
    if not folder and not problems:
        raise UserError(
            "it is missing: the folder of the comparison, in which the same command goes on.", key="output_dir"
        )
    if {**file, **given}.get("resume_from_checkpoint"):
        raise UserError(
            "leave it out: the same command goes on where it was interrupted.", key="resume_from_checkpoint"
        )
    starts_over = str({**file, **given}.get("overwrite_output_dir", False)).lower() == "true"
    for source in (file, given):
        source.pop("overwrite_output_dir", None)
    words = (values["search"], values["trials"], values["prune"], values["grid"], values["cell"])
    check_words(*words)
    if values["search"] is not None and not problems:
        read_space(values["search"], {**file, **given})
    example = _first_places(values["grid"] or values["search"])
    checked = {**given, **example}
    check_run({k: v for k, v in file.items() if k not in example}, checked, problems, NEEDS, talks=not values["quiet"])
    if "model_name_or_path" not in example and "model_name_or_path" in checked:
        given["model_name_or_path"] = checked["model_name_or_path"]  # that suits the data
    seeds = _seeds(values["seeds"], file, given)

    with quick_imports():
        from hf_transfer.settings import Config
        from hf_transfer.studies.answering import answer, run_one
        from hf_transfer.studies.question import Question

    base = {name: value for name, value in {**file, **given}.items() if name != "output_dir"}
    quiet = {} if "log_level" in base else {"log_level": "error"}

    def make(changes: Mapping[str, Any], without: Collection[str] = ()) -> Config:
        left_out = {*without, *changes, "output_dir"}
        from_file, typed = ({n: v for n, v in s.items() if n not in left_out} for s in (file, given))
        return Config.from_sources(from_file, {**quiet, **typed, **changes}, problems)

    question = Question(
        given=_typed(base),
        grid=values["grid"] or {},
        seeds=seeds,
        folder=Path(str(folder)),
        against=values["against"] or (),
        search=values["search"],
        trials=values["trials"],
        prunes=values["prune"],
        metric=values["metric"],
        combine=values["combine"],
        max_cells=values["max_cells"],
        skips=values["skip_contradictions"],
        expects=values["estimate"],
        starts_over=starts_over,
    )
    if values["cell"] is not None:
        outcome = run_one(question, make, values["cell"], talks=not values["quiet"])
        if outcome.results is None:
            raise WorkFailed(f"{outcome.cell.name} failed: {outcome.why_not}")
        return 0
    comparison = answer(question, make, talks=not values["quiet"])
    if comparison.failures:
        count = len(comparison.failures)
        raise WorkFailed(
            f"{count} cell{'' if count == 1 else 's'} failed; the first: {comparison.failures[0]}",
            "The others are compared. The same command tries again what failed.",
        )
    if values["strict"] and comparison.hurt:
        raise WorkFailed(f"Pretraining or tuning hurt: {', '.join(comparison.hurt)}.")
    return 0


def _own_of_file(file: dict[str, Any], values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The verb's own keys in a file, which are taken out of it; the command line comes before them."""
    own = {name: key for name, key in keys().items() if name in CompareArguments.__dataclass_fields__}
    found: dict[str, Any] = {}
    for name, key in own.items():
        if name in file:
            raw = file.pop(name)
            if values[name] != key.default:
                continue
            try:
                found[name] = coerce(raw, key)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    return found


def _first_places(grid: Any) -> dict[str, Any]:
    """The first value of each place that varies: what is checked before anything slow is imported."""
    if isinstance(grid, list):  # of rows
        first = grid[0] if grid and isinstance(grid[0], Mapping) else {}
        return {name: value for name, value in first.items() if name in _PLACES}
    return {
        name: values[0]
        for name, values in (grid.items() if isinstance(grid, Mapping) else ())
        if name in _PLACES and isinstance(values, list | tuple) and values
    }


def _seeds(seeds: list[int] | int | None, file: Mapping[str, Any], given: dict[str, Any]) -> list[int]:
    """The seeds; a run's own `seed` counts as one, and may not be given beside them."""
    own = given.pop("seed", None)
    own = file.pop("seed", None) if own is None else own  # type: ignore[attr-defined]
    if seeds is None:
        return [_SEED if own is None else int(own)]
    if own is not None:
        raise UserError("seed and seeds contradict each other: keep seeds.")
    return seeds if isinstance(seeds, list) else [seeds]


def _typed(base: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all cells as their types, so that the same command is recognized however it is written."""
    from hf_transfer.keys import keys as all_keys

    return {name: coerce(value, all_keys()[name]) for name, value in base.items() if name in all_keys()}
