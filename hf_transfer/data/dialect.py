"""How a file of delimited text is written: compression, encoding, delimiter and quoting, decided once per file."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hf_transfer.errors import UserError

_BEGINNING = 1 << 20  # bytes from which the delimiter is decided
_SEEN = 50  # rows that have to agree on the number of cells
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_FIELD_LIMIT = 2**31 - 1  # characters of a cell; the csv module's own limit is 131,072
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# How other kinds of files begin, whatever their name says.
_OTHER_KINDS = {
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "Unpack it, or export the sheet as CSV."),
    b"\xd0\xcf\x11\xe0": ("an Excel file", "Export the sheet as CSV (UTF-8)."),
    b"PAR1": ("a Parquet file", "Rename it to .parquet."),
    b"%PDF": ("a PDF document", "Export the table as CSV."),
    b"BZh": ("compressed with bzip2", "Decompress it: bunzip2 FILE."),
    b"\xfd7zXZ": ("compressed with xz", "Decompress it: unxz FILE."),
    b"(\xb5/\xfd": ("compressed with zstd", "Decompress it: unzstd FILE."),
}
_HALF = re.compile("[\ud800-\udfff]")
_MARK = "hf_transfer.mark"
codecs.register_error(_MARK, lambda error: ("\udc80", error.end))  # type: ignore[attr-defined]


def is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_text(path: Path, skip_bad: bool = False, newline: str | None = None) -> IO[str]:
    """A text file, decompressed (gzip) and decoded as its byte order mark says, else as UTF-8.

    Args:
        path: the file.
        skip_bad: mark bytes that are not valid, see `is_broken`, instead of raising `UnicodeDecodeError`.
        newline: as in `open`.

    Raises:
        UserError: it is another kind of file.
    """
    opened: Any = gzip.open(path, "rb") if is_compressed(path) else path.open("rb")  # noqa: SIM115 - the caller closes it
    beginning = opened.read(8)
    opened.seek(0)
    for magic, (kind, remedy) in _OTHER_KINDS.items():
        if beginning.startswith(magic):
            opened.close()
            raise UserError(f"{str(path)!r} is {kind}.", remedy.replace("FILE", path.name))
    encoding = next((e for mark, e in _BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(beginning) == 8 and not (any(beginning[::2]) and any(beginning[1::2])):
        opened.close()
        raise UserError(f"{str(path)!r} is UTF-16 without a byte order mark.", convert(path))
    return io.TextIOWrapper(opened, encoding, _MARK if skip_bad else "strict", newline)


def is_broken(text: str) -> bool:
    """Whether a text holds half a character: a byte that could not be decoded, or an escape such as `\\ud800`."""
    return not text.isascii() and _HALF.search(text) is not None


def convert(path: Path) -> str:
    """The command that converts a text file in another encoding to UTF-8, as a sentence."""
    with path.open("rb") as file:
        beginning = file.read(1000)
    encoding = "utf-16" if beginning[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
    if encoding == "cp1252" and b"\0" in beginning:
        encoding = "utf-16le" if beginning[1:2] == b"\0" else "utf-16be"
    return f"`iconv -f {encoding} -t utf-8 {path.name} > utf8{path.suffix}` converts it."


@dataclass(frozen=True)
class Dialect:
    """How the cells of a file are separated and quoted.

    Attributes:
        delimiter: character between two cells.
        quoting: `csv`: cells in double quotes may hold delimiters and line ends (RFC 4180); `none`: a quote is a
            character like any other, and each line is a row; `whole`: the same, but quotes around whole cells are
            removed.
        skipped_lines: lines before the header (`sep=;`, which Excel writes).
        spaced: a space after each delimiter belongs to no cell.
        notes: what differs from what the file's name promises.
    """

    delimiter: str
    quoting: str = "csv"
    skipped_lines: int = 0
    spaced: bool = False
    notes: tuple[str, ...] = field(default=())

    def rows(self, file: IO[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
        """(number of its first line, cells) of each row that is not blank; an error in place of a malformed row."""
        csv.field_size_limit(_FIELD_LIMIT)
        for _ in range(self.skipped_lines):
            file.readline()
        plain = self.quoting != "csv"
        reader = csv.reader(
            file,
            delimiter=self.delimiter,
            strict=not plain,
            quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
            skipinitialspace=self.spaced,
        )
        end = reader.line_num
        while True:
            start = end + 1 + self.skipped_lines
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                end = reader.line_num
                yield start, error
                continue
            end = reader.line_num
            if cells:
                yield start, [_unquoted(c) for c in cells] if self.quoting == "whole" else cells


def find_dialect(path: Path) -> Dialect:
    """The dialect of a file of delimited text.

    The delimiter is the one that the suffix promises (tab for `.tsv`, else a comma), unless the header does not hold
    it and holds another one that splits the beginning into rows of one length. In a file with tabs a quote is a
    character like any other as long as every line has as many cells as the header.

    Raises:
        UserError: it is another kind of file.
        UnicodeDecodeError: it is not text in UTF-8.
    """
    with open_text(path, skip_bad=True, newline="") as file:
        beginning = file.read(_BEGINNING)
    skipped, declared = _declared(beginning)
    promised = declared or ("\t" if ".tsv" in path.suffixes[-2:] else ",")
    header = _first_line(beginning, skipped)
    unquoted = re.sub('"[^"]*"', "", header)
    delimiter, notes = promised, []
    if promised not in unquoted:
        fits = [d for d in _DELIMITERS if d in unquoted and _is_table(beginning, skipped, d)]
        if fits:
            delimiter = max(fits, key=unquoted.count)
            notes.append(f"{path.name}: the cells are separated by {_DELIMITERS[delimiter]}.")
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            notes.append(f"{path.name}: read as UTF-16.")
    spaced = is_spaced(header, delimiter)
    if spaced:
        notes.append(f"{path.name}: the space after each delimiter belongs to no cell.")
    quoting, note = _quoting(path, delimiter, skipped) if delimiter == "\t" else ("csv", "")
    return Dialect(delimiter, quoting, skipped, spaced, tuple([*notes, note] if note else notes))


def is_spaced(header: str, delimiter: str) -> bool:
    """Whether a header is written with a space after each delimiter: `text, label`."""
    names = header.split(delimiter)[1:]
    return bool(names) and all(name.startswith(" ") for name in names)


def _declared(beginning: str) -> tuple[int, str]:
    """(number of lines before the header, the delimiter that the first of them declares)."""
    first = beginning.split("\n", 1)[0].strip().strip('"')
    is_declaration = first.lower().startswith("sep=") and len(first) == 5
    return (1, first[4]) if is_declaration else (0, "")


def _first_line(beginning: str, skipped: int) -> str:
    lines = [line for line in beginning.splitlines()[skipped : skipped + _SEEN] if line.strip()]
    return lines[0] if lines else ""


def _is_table(beginning: str, skipped: int, delimiter: str) -> bool:
    """Whether the first rows have as many cells as the header, and more than one."""
    whole = beginning if len(beginning) < _BEGINNING else beginning[: beginning.rfind("\n")]
    for quoting in ("none", "csv") if delimiter == "\t" else ("csv",):
        rows = Dialect(delimiter, quoting, skipped).rows(io.StringIO(whole, newline=""))
        widths = {len(row) if isinstance(row, list) else 0 for _, row in islice(rows, _SEEN)}
        if len(widths) == 1 and min(widths) > 1:
            return True
    return False


def _quoting(path: Path, delimiter: str, skipped: int) -> tuple[str, str]:
    """(`quoting` of a file with tabs, a note about it); reads the whole file once.

    SST-2, QQP and MRPC are written without quoting, pandas quotes cells that hold a tab, a quote or a line end.
    """
    width, quoted, whole = 0, 0, True
    with open_text(path, skip_bad=True, newline="") as file:
        for _, cells in Dialect(delimiter, "none", skipped).rows(file):
            assert isinstance(cells, list), "without quoting nothing is malformed"
            width = width or len(cells)
            if len(cells) != width:
                return ("csv", "") if _reads_as_csv(path, delimiter, skipped, width) else ("none", "")
            for cell in cells:
                if cell.startswith('"'):
                    quoted += 1
                    whole = whole and _is_quoted(cell)
    if quoted and whole:
        return "whole", f"{path.name}: the quotes around {quoted:,} cells were removed."
    return "none", ""


def _reads_as_csv(path: Path, delimiter: str, skipped: int, width: int) -> bool:
    """Whether every row has `width` cells if quotes may enclose delimiters and line ends."""
    with open_text(path, skip_bad=True, newline="") as file:
        rows = Dialect(delimiter, "csv", skipped).rows(file)
        return all(isinstance(row, list) and len(row) == width for _, row in rows)


def _is_quoted(cell: str) -> bool:
    inside = cell[1:-1]
    return len(cell) > 1 and cell.endswith('"') and '"' not in inside.replace('""', "")


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell
