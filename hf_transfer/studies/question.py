"""What a comparison asks, and whether it can be asked, before anything is run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_transfer.config.values import load_yaml
from hf_transfer.errors import UserError, option
from hf_transfer.files import as_json, write_text
from hf_transfer.run_folder import COMPARISON, REPORT, refuse_model
from hf_transfer.runs.shared import Shared
from hf_transfer.studies import space as space_words
from hf_transfer.studies import transfer
from hf_transfer.studies.combining import check_combine
from hf_transfer.studies.expecting import expect, in_words
from hf_transfer.studies.grid import (
    NO_MATTER,
    Cell,
    Make,
    Row,
    cell_of,
    cells_of,
    possible,
    read_rows,
)
from hf_transfer.studies.running import check_metric
from hf_transfer.studies.searching import TRIALS, Search, base_rows, space_rows

MAX_CELLS = 200
RECIPE, TABLE, SHEET, PICTURE, WHOLE = "compare.yaml", "compare.md", "compare.csv", "compare.png", COMPARISON
CURVES, DOTS = "curves.png", "search.png"
_OWN = ("grid", "seeds", "against", "trials")  # of the recipe: may change when a comparison goes on


@dataclass(frozen=True)
class Question:
    """What is compared.

    Attributes:
        given: keys of all cells.
        grid: values by key, or rows, not yet read.
        seeds: of every row.
        folder: of the comparison.
        against: references that every row is compared with, see `transfer.read_against`.
        search: a range or choices by key, or `auto`, not yet read; None for a grid.
        trials: of a search; None for the default.
        prunes: whether hopeless trials of a search are stopped.
        metric: of the validation split, that decides; None for the one that such runs are judged by.
        combine: soup or ensemble of all runs, on validation; None for neither.
        max_cells: most runs, references included.
        skips: whether rows whose keys contradict each other are left out.
        expects: whether the time is estimated before the start.
        starts_over: whether an earlier comparison in the folder is removed.
    """

    given: Mapping[str, Any]
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    folder: Path
    against: Sequence[str] | Mapping[str, Any] = ()
    search: Any = None
    trials: int | None = None
    prunes: bool = True
    metric: str | None = None
    combine: str | None = None
    max_cells: int = MAX_CELLS
    skips: bool = False
    expects: bool = True
    starts_over: bool = False


def cells_asked(question: Question, make: Make) -> tuple[list[Cell], list[str]]:
    """(the runs of the grid, in order; contradictory rows that are left out), after all checks that need no run.

    Raises:
        UserError: keys, values, seeds or the number of cells are not right.
    """
    against, seeds = _read(question)
    asked = read_rows(question.grid, question.given)
    if not question.grid and len(seeds) < 2 and not question.against:
        raise UserError(
            "there is nothing to compare: no grid, one seed, and no reference.",
            f"Give {option('grid', '{strategy: [linear-probe, full]}')}, several seeds, or against.",
        )
    count = len(asked) * len(seeds) * (1 + len(question.against))
    if count > question.max_cells:
        raise UserError(
            f"the comparison has {count:,} cells ({len(asked):,} rows, {len(seeds)} seeds"
            + (f", {len(question.against)} references each" if question.against else "")
            + f"), more than {question.max_cells:,}{_as_long(asked[0], count, make, seeds[0])}.",
            f"Vary fewer keys or values, or allow more with {option('max_cells', count)}.",
            key="max_cells",
        )
    rows, left_out = possible(asked, make, seeds[0], question.skips)
    _check_references(rows, against, make, question)
    return cells_of(rows, seeds, make, question.folder), left_out


def search_asked(question: Question, make: Make) -> Search:
    """The search that is asked for, after all checks that need no run.

    Raises:
        UserError: as `cells_asked`; ranges are wrong, or every value contradicts another key.
    """
    against, seeds = _read(question)
    space = space_words.read_space(question.search, question.given)
    trials = int(min(question.trials or space_words.TRIALS, space_words.count_of(space)))
    rows, _ = possible(space_rows(space), make, seeds[0], question.skips)
    first = base_rows(make, seeds[0], space)
    _check_references([*first, *rows], against, make, question)
    count = (trials + len(first) + len(against)) * len(seeds)
    if count > question.max_cells:
        raise UserError(
            f"the search has {count:,} cells ({trials} trials, {len(seeds)} seeds), more than {question.max_cells:,}.",
            f"Ask for fewer trials or seeds, or allow more with {option('max_cells', count)}.",
            key="max_cells",
        )
    return Search(
        space,
        trials,
        seeds,
        make,
        question.folder,
        metric=question.metric,
        prunes=question.prunes,
        skips=question.skips,
        first=first,
    )


def _read(question: Question) -> tuple[dict[str, dict[str, Any]], list[int]]:
    """(references with their own keys, seeds), checked with the other words that a grid and a search have.

    Raises:
        UserError: any of them is not right.
    """
    check_metric(question.metric)
    against = transfer.read_against(question.against)
    seeds = list(question.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise UserError(f"expected different whole numbers, such as 0,1,2, got {seeds}.", key="seeds")
    check_combine(question.combine, seeds, question.given)
    return against, seeds


def _check_references(
    rows: Sequence[Row], against: Mapping[str, dict[str, Any]], make: Make, question: Question
) -> None:
    """Raises:
    UserError: a row cannot be compared with a reference.
    """
    for kind, own in against.items():
        for row in rows:
            try:
                cell_of(transfer.reference_of(row, kind, own), question.seeds[0], make, question.folder)
            except UserError as error:
                raise UserError(f"{kind} for {row.name}: {error}", key="against") from error


def _as_long(row: Row, count: int, make: Make, seed: int) -> str:
    """How long so many cells take, from a row; empty if it cannot be prepared."""
    found, _ = expect([row], make, seed, Shared())
    each = found.of_rows[row.name]
    if each is None:
        return ""
    return f"; at the time of the first one, {in_words(each.seconds * count, each.usd_per_hour)}"


def open_folder(question: Question) -> None:
    """Write the recipe, which marks the folder of a comparison.

    Raises:
        UserError: the folder is that of a run, or of another comparison.
    """
    folder, path = question.folder, question.folder / RECIPE
    refuse_model(folder, "output_dir")
    given = {name: value for name, value in question.given.items() if name not in NO_MATTER}
    recipe = as_json({**given, "grid": question.grid, "seeds": question.seeds, "against": question.against})
    if question.search is not None:
        trials = question.trials or space_words.TRIALS
        recipe |= as_json({"search": question.search, "trials": trials, "prune": question.prunes})
    if path.is_file() and question.starts_over:
        shutil.rmtree(folder / "cells", ignore_errors=True)
        for name in (RECIPE, TABLE, SHEET, PICTURE, CURVES, DOTS, WHOLE, TRIALS, REPORT):
            (folder / name).unlink(missing_ok=True)
    if path.is_file():
        before = load_yaml(path.read_text(encoding="utf-8"))
        other = sorted(k for k in {*before, *recipe} - set(_OWN) if before.get(k) != recipe.get(k))
        if other:
            raise UserError(
                f"{str(folder)!r} holds another comparison: {other[0]} was {before.get(other[0])!r} and is now "
                f"{recipe.get(other[0])!r}.",
                f"Choose another folder, or start over with {option('overwrite_output_dir', True)}.",
                key="output_dir",
            )
    head = (
        "# The keys of all cells, and what is compared: hf-transfer compare --config compare.yaml --output_dir again\n"
    )
    write_text(path, head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
