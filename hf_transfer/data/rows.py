"""The rows of CSV, TSV, JSON, JSON lines and Parquet files: one reader for training, evaluation, streams and `predict`.

Every cell of a CSV file is the text that stands there; an empty one is None. Nothing is padded, cut, shifted or merged:
a row that does not fit is given as a `BadRow` with its place and the reason.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hf_transfer.data.dialect import Dialect, convert, find_dialect, is_broken, open_text
from hf_transfer.errors import UserError, one_line

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_REMEDIES = {
    (".xlsx", ".xls", ".xlsm", ".ods"): "Export the sheet as CSV (UTF-8).",
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "Unpack it and name the files or the folder.",
    (".bz2", ".xz", ".zst"): "Decompress it; gzip files (.csv.gz) are read as they are.",
    (".arrow", ".feather", ".pkl", ".pickle", ".h5", ".sqlite", ".db"): "Save it as Parquet or CSV.",
}
_MOST_HEADER_ROWS = 1000  # rows with which a header is compared
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS_OF_A_TEXT = 4
_PARQUET_ROWS = 256
_NOT_UTF8 = "not valid UTF-8"
_MANY = 10  # values of one cell of a table that has one row


@dataclass(frozen=True)
class BadRow:
    """A row that does not fit its table.

    Attributes:
        place: file and line.
        reason: what is wrong with it.
    """

    place: str
    reason: str


def format_of(path: Path) -> str | None:
    """`csv`, `json` or `parquet` by the suffix, also of a file compressed with gzip; None for other files."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        inner = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner != "parquet" else None
    return FORMATS.get(path.suffix.lower())


def remedy(path: Path) -> str:
    """What to do about a file that is no table."""
    suffix = path.suffix.lower()
    known = next((text for suffixes, text in _REMEDIES.items() if suffix in suffixes), "")
    return known or f"Use one of {', '.join(FORMATS)}."


class DelimitedFile:
    """A CSV or TSV file.

    Args:
        path: the file.
        skip_bad: a row with bytes that are not valid UTF-8 does not fit, instead of an error.

    Attributes:
        names: column names; one without a name is called `Unnamed: i`, as pandas does.
        notes: how the file differs from what its name promises.

    Raises:
        UserError: the file is empty, of another kind, repeats a column name, or has no header.
    """

    def __init__(self, path: Path, skip_bad: bool = False):
        self.path, self.skip_bad = path, skip_bad
        with explained(path):
            self.dialect: Dialect = find_dialect(path)
            beginning = list(islice(self._lines(), _MOST_HEADER_ROWS + 1))
        self.notes = self.dialect.notes
        if not beginning:
            raise UserError(f"{str(path)!r} is empty.", "Use a file with a header and at least one example.")
        header = beginning[0][1]
        if isinstance(header, str):
            raise UserError(f"line {beginning[0][0]} of {str(path)!r} cannot be read: {header}.")
        if any(map(is_broken, header)):
            raise UserError(f"the header of {str(path)!r} is not text in UTF-8.", convert(path))
        self.header = header
        self.names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(header)]
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise several_columns(path, repeated[0])
        rows = [cells for _, cells in beginning[1:] if isinstance(cells, list) and len(cells) == len(header)]
        if reason := _looks_like_data(header, rows):
            raise UserError(
                f"the first row of {str(path)!r} looks like data, not like column names ({reason}).",
                "Add a line with the column names, for example text,label.",
            )

    def _lines(self) -> Iterator[tuple[int, list[str] | str]]:
        with open_text(self.path, self.skip_bad, newline="") as file:
            for line, row in self.dialect.rows(file):
                yield line, f"a quote is not closed or not doubled ({row})" if isinstance(row, csv.Error) else row

    def rows(self) -> Iterator[list[str | None] | BadRow]:
        """The cells of each row in the order of `names`.

        Raises:
            UserError: the file cannot be read.
        """
        with explained(self.path):
            for line, cells in islice(self._lines(), 1, None):
                if reason := self._reason(cells):
                    yield BadRow(f"{self.path.name} line {line}", reason)
                else:
                    yield [cell or None for cell in cells]

    def lines_of(self, rows: Collection[int]) -> dict[int, int]:
        """{row: the line on which it begins}, the rows that do not fit not counted."""
        good = (line for line, cells in islice(self._lines(), 1, None) if not self._reason(cells))
        wanted = set(rows)
        return {row: line for row, line in enumerate(islice(good, max(wanted, default=-1) + 1)) if row in wanted}

    def _reason(self, cells: list[str] | str) -> str:
        """Why a row does not fit; empty if it does."""
        if isinstance(cells, str):
            return cells
        if len(cells) != len(self.names):
            return self._width_reason(len(cells))
        if self.skip_bad and any(map(is_broken, cells)):
            return _NOT_UTF8
        return "it repeats the header" if cells == self.header else ""

    def _width_reason(self, cells: int) -> str:
        few = cells < len(self.names)
        kind = "tab" if self.dialect.delimiter == "\t" else repr(self.dialect.delimiter)
        why = "a cell is missing" if few else f"a cell that contains a {kind} has to stand in double quotes"
        return f"it has {cells} {'cell' if cells == 1 else 'cells'}, and the header has {len(self.names)}; {why}"


def several_columns(path: Path, name: str) -> UserError:
    return UserError(f"{str(path)!r} has several columns called {name!r}.", "Rename them.")


def read_rows(path: Path, skip_bad: bool = False) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of a file as values by column name.

    Raises:
        UserError: the file cannot be read.
    """
    form = format_of(path)
    if form == "csv":
        table = DelimitedFile(path, skip_bad)
        for row in table.rows():
            yield row if isinstance(row, BadRow) else dict(zip(table.names, row, strict=True))
    elif form == "json":
        yield from json_rows(path, skip_bad)
    else:
        with explained(path):
            yield from _parquet_rows(path)


def places_of(path: Path, rows: Collection[int]) -> dict[int, str]:
    """{row: its place in the file}, the rows that do not fit not counted: its line in CSV, else its number from 1.

    The file is read once.
    """
    if format_of(path) == "csv":
        lines = DelimitedFile(path, skip_bad=True).lines_of(rows)
        return {row: f"{path.name} line {lines[row]}" for row in rows}
    return {row: f"{path.name} row {row + 1}" for row in rows}


def json_rows(path: Path, skip_bad: bool = False) -> Iterator[dict[str, Any] | BadRow]:
    """The objects of a JSON list or of JSON lines.

    Raises:
        UserError: the file cannot be read or is not one of the two.
    """
    with explained(path), open_text(path, skip_bad) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            text = file.read()
            for number, row in enumerate(_json_list(path, text), 1):
                yield _object(row, f"{path.name} entry {number}", text)
            return
        _check_lines(path, file)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                row = json.loads(line, object_pairs_hook=_pairs)
            except ValueError as error:
                yield BadRow(place, f"it is not valid JSON ({one_line(error, 80)})")
                continue
            yield _object(row, place, line)


def _check_lines(path: Path, file: IO[str]) -> None:
    """Raises:
    UserError: the file is one object over several lines, or one that holds the columns or the list of the examples.
    """
    first, second = (next((line for line in file if line.strip()), "") for _ in range(2))
    file.seek(0)
    row = _parsed(first)
    holds_table = isinstance(row, dict) and any(
        isinstance(v, dict) or (isinstance(v, list) and (len(v) > _MANY or any(isinstance(x, dict) for x in v)))
        for v in row.values()
    )
    if first.strip() == "{" or (holds_table and not second):
        raise UserError(
            f"{str(path)!r} is one JSON object, not a list of objects or JSON lines.",
            'Write one object per example: frame.to_json(path, orient="records", lines=True) in pandas.',
        )


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        return list(json.loads(text, object_pairs_hook=_pairs))
    except ValueError as error:
        raise UserError(
            f"{str(path)!r} is not valid JSON ({one_line(error, 100)}).", "Check that it is whole."
        ) from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return values


def _object(row: Any, place: str, written: str) -> dict[str, Any] | BadRow:
    """A row, `written` in this text or in a part of it."""
    if not isinstance(row, dict):
        return BadRow(place, f"{json.dumps(row)[:60]} is not an object with named values")
    may_be_broken = "\\u" in written or not written.isascii()
    if may_be_broken and is_broken(json.dumps(row, ensure_ascii=False)):
        return BadRow(place, _NOT_UTF8 if is_broken(written) else "not valid Unicode (half a character)")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
            yield from batch.to_pylist()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Context in which errors of reading a file become `UserError`s about it."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not text in UTF-8.",
            f"{convert(path)} `on_bad_example: skip` leaves the rows out that are not.",
        ) from error
    except PermissionError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({one_line(error, 150)}).", "Check that it is whole.") from error


def _looks_like_data(header: list[str], rows: list[list[str]]) -> str:
    """Why the first row is no header; empty if it may be one.

    A number is no column name, unless the names are 0, 1, 2, … as pandas writes them. A value that occurs again and
    again below itself is no name either if the row also holds something as long as a text.
    """
    if header == [str(i) for i in range(len(header))]:
        return ""
    if number := next((cell for cell in header if _NUMBER.fullmatch(cell.strip())), ""):
        return f"{number!r} is a number"
    if len(header) > 1 and any(len(cell.split()) >= _WORDS_OF_A_TEXT for cell in header):
        for i, cell in enumerate(header):
            values = Counter(row[i] for row in rows)
            if values[cell] > 1 and len(values) <= max(2, len(rows) // 4):
                return f"{cell!r} also occurs below"
    return ""
