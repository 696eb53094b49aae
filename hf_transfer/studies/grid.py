"""The cells of a comparison: every combination of values, with every seed, and the hash that a cell is kept by."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hf_transfer.config.arguments.forgetting import PLACES
from hf_transfer.config.command_line import unknown
from hf_transfer.config.places import check_places
from hf_transfer.config.values import coerce
from hf_transfer.data.raw import RawSplits
from hf_transfer.errors import UserError, UserErrors, one_line
from hf_transfer.files import as_json
from hf_transfer.settings import Config, keys
from hf_transfer.studies.space import NOT_VARIED

# Of a cell's configuration: what does not decide what comes out.
NO_MATTER = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "log_level", "disable_tqdm", "run_name")
_DATA = ("dataset_name", "train_file", "validation_file", "test_file")
_PLACES = (*_DATA, "model_name_or_path", "target_dataset_name", "forgetting_dataset_name", *PLACES)
_CHUNK = 2**20

# (what is changed, keys that are left out) to a configuration.
Make = Callable[[Mapping[str, Any], Collection[str]], Config]


@dataclass(frozen=True)
class Row:
    """A combination of values.

    Attributes:
        settings: by key.
        of: the row that this one is a reference for, with the reference's name; empty for a row of the grid.
        without: keys of the comparison that it leaves out.
    """

    settings: Mapping[str, Any]
    of: str = ""
    without: frozenset[str] = field(default=frozenset())

    @property
    def name(self) -> str:
        """The values of the keys that vary."""
        return self.of or ", ".join(f"{key}={shown(value)}" for key, value in self.settings.items()) or "as given"


@dataclass(frozen=True)
class Cell:
    """A run of a comparison.

    Attributes:
        row: that it belongs to.
        seed: of the run.
        key: hash of its resolved configuration and its data.
        folder: of the run.
    """

    row: Row
    seed: int
    key: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed={self.seed}"


def shown(value: Any) -> str:
    """A value of a grid in a line."""
    value = as_json(value)
    return value if isinstance(value, str) else json.dumps(value)


def read_grid(grid: Any, given: Collection[str]) -> dict[str, list[Any]]:
    """The values of each key that varies, as the key's type.

    Args:
        grid: a mapping of keys to lists.
        given: keys that the comparison sets for all cells.

    Raises:
        UserErrors: every unknown key, wrong value, and key that does not vary.
    """
    if not isinstance(grid, Mapping):
        raise UserError(
            "expected a mapping of keys to lists, such as '{strategy: [linear-probe, full]}', or a list of rows, such "
            "as '[{}, {strategy: full}]'.",
            key="grid",
        )
    problems, read = list[str](), dict[str, list[Any]]()
    for name, values in grid.items():
        if name in NOT_VARIED:
            problems.append(f"grid: {name} cannot vary: {NOT_VARIED[name]}.")
        elif name not in keys():
            problems.append(f"grid: {unknown(str(name), keys())}")
        elif name in given:
            problems.append(f"grid: {name} is given for all cells as well; keep one.")
        elif not isinstance(values, list | tuple):
            problems.append(f"grid: {name}: expected a list of values, got {values!r}.")
        elif len(values) < 2:
            problems.append(f"grid: {name} has {len(values) or 'no'} value, so it does not vary; give it as a key.")
        else:
            try:
                read[name] = [coerce(value, keys()[name]) for value in values]
            except ValueError as error:
                problems.append(f"grid: {name}: {error}")
                continue
            if len({shown(value) for value in read[name]}) < len(values):
                problems.append(f"grid: {name} names a value twice.")
    if problems:
        raise UserErrors(problems)
    return read


def read_rows(grid: Any, given: Collection[str]) -> list[Row]:
    """The rows of a grid: every combination of the values of a mapping, or those of a list as they stand.

    Args:
        grid: a mapping of keys to lists, or a list of mappings of keys to values, which come before the keys that are
            given for all cells.
        given: keys that the comparison sets for all cells.

    Raises:
        UserErrors: as `read_grid`.
    """
    if not isinstance(grid, list | tuple):
        return rows_of(read_grid(grid, given))
    problems, rows = list[str](), list[Row]()
    for number, settings in enumerate(grid, 1):
        if not isinstance(settings, Mapping):
            problems.append(f"grid: row {number}: expected a mapping of keys to values, got {settings!r}.")
            continue
        read: dict[str, Any] = {}
        for name, value in settings.items():
            try:
                if name in NOT_VARIED:
                    raise ValueError(f"{name} cannot vary: {NOT_VARIED[name]}.")
                if name not in keys():
                    raise ValueError(unknown(str(name), keys()))
                read[name] = coerce(value, keys()[name])
            except ValueError as error:
                problems.append(f"grid: row {number}: {error}")
        rows.append(Row(read))
    if len(grid) < 2:
        problems.append(f"grid: {len(grid)} row is nothing to compare; give its keys as keys.")
    if problems:
        raise UserErrors(problems)
    return rows


def rows_of(grid: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Every combination, the last key varying fastest."""
    return [Row(dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]


def possible(rows: Sequence[Row], make: Make, seed: int, skips: bool) -> tuple[list[Row], list[str]]:
    """(rows whose keys fit together, a line for each that was left out).

    Args:
        rows: of the grid.
        make: gives the configuration of changed keys.
        seed: any of the comparison.
        skips: whether contradictory rows are left out.

    Raises:
        UserErrors: rows are contradictory and not to be left out, or all are.
    """
    good, reasons = list[Row](), dict[str, tuple[str, ...]]()
    for row in rows:
        try:
            check_places(make({**row.settings, "seed": seed}, row.without).values)
        except UserErrors as error:
            reasons[row.name] = error.problems
        except UserError as error:
            reasons[row.name] = (str(error),)
        else:
            good.append(row)
    if not good and len(set(reasons.values())) == 1:  # not a matter of the grid
        raise UserErrors(next(iter(reasons.values())))
    lines = [f"{name}: {' '.join(said)}" for name, said in reasons.items()]
    if lines and not (skips and good):
        fix = "" if not good else " Leave them out with skip_contradictions: true."
        raise UserErrors([*lines[:-1], f"{lines[-1]}{fix}"])
    return good, lines


def cells_of(rows: Sequence[Row], seeds: Sequence[int], make: Make, folder: Path) -> list[Cell]:
    """The runs of the rows: of each row all seeds.

    Raises:
        UserError: two rows are the same configuration.
    """
    cells = [cell_of(row, seed, make, folder) for row in rows for seed in seeds]
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.key, cell)
        if other is not cell:
            raise UserError(
                f"{other.row.name!r} and {cell.row.name!r} are the same configuration.", "Leave one out.", key="grid"
            )
    return cells


def cell_of(row: Row, seed: int, make: Make, folder: Path) -> Cell:
    """A run of a row.

    Raises:
        UserError: its keys do not fit together.
    """
    config = make({**row.settings, "seed": seed, "output_dir": str(folder)}, row.without)
    key = digest(config)
    return Cell(row, seed, key, folder / "cells" / key)


# ---- the hash ----


def digest(config: Config) -> str:
    """What a configuration and its data are, as 12 hexadecimal digits; where they are written does not matter."""
    values = {name: value for name, value in config.values.items() if name not in NO_MATTER}
    places = {name: _place(str(values[name])) for name in _PLACES if values.get(name)}
    if config.data.in_memory is not None:
        places["in_memory"] = _of_splits(config.data.in_memory)
    if config.data.target_in_memory is not None:
        places["target_in_memory"] = _of_splits(config.data.target_in_memory)
    text = json.dumps(as_json({**values, **places}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _place(name: str) -> str:
    """Of a file its content; of a folder what is in it, by name, size and time; of anything else its name."""
    path = Path(name).expanduser()
    if name.startswith("bundled:") or not path.exists():
        return name
    if path.is_file():
        stat = path.stat()
        return _of_file(path, stat.st_size, stat.st_mtime_ns)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    listing = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(listing).encode()).hexdigest()


@cache
def _of_file(path: Path, size: int, modified: int) -> str:
    """SHA-256; size and time only tell whether it has to be read again."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _of_splits(splits: RawSplits) -> str:
    """Of data in memory, the values of every column."""
    found = hashlib.sha256()
    for name, split in splits.items():
        found.update(repr((name, len(split), str(split.features))).encode())
        for batch in split.with_format("arrow").iter(1000):
            for column in batch.column_names:
                found.update(repr(batch[column].to_pylist()).encode())
    return found.hexdigest()


def why(error: BaseException) -> str:
    """An error as the reason why a cell has no result."""
    return one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
