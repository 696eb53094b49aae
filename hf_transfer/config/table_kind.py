"""What the suffix and the beginning of a file tell: its format, and whether a table lists images or texts."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import Any

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BEGINNING = 1 << 14  # bytes of a table that are looked at
_ROWS = 20  # rows of a Parquet file, likewise
_SHARE = 0.5  # of the rows, from which on an image in each is what the table is about
# A whole cell that is the path of an image, not a text that mentions one: between delimiters or quotes, and no URL.
_IMAGE_CELL = re.compile(
    rf"""(?:^|[\t,;|"'])[^\t\r\n,;|"':]+(?:{"|".join(map(re.escape, IMAGES))})(?=$|[\t\r\n,;|"'])""",
    re.IGNORECASE | re.MULTILINE,
)


def format_of(path: Path) -> str | None:
    """`csv`, `json` or `parquet` by the suffix, also of a file compressed with gzip; None for other files."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        inner = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner != "parquet" else None
    return FORMATS.get(path.suffix.lower())


def kind_of_table(path: Path) -> str:
    """`image` if most of the first rows name or hold an image, else `text`; empty if the file cannot be read."""
    if format_of(path) == "parquet":
        return _kind_of_parquet(path)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            beginning = file.read(_BEGINNING).decode("utf-8", errors="replace")
    except (OSError, EOFError, zlib.error):
        return ""
    rows = beginning.count("{") if format_of(path) == "json" else beginning.count("\n") - 1
    return "image" if len(_IMAGE_CELL.findall(beginning)) >= max(1, _SHARE * rows) else "text"


def _kind_of_parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = next(file.iter_batches(_ROWS), None)
    except (OSError, pyarrow.ArrowException):
        return ""
    cells = [] if rows is None else [cell for row in rows.to_pylist() for cell in row.values() if _is_image(cell)]
    return "image" if cells and rows is not None and len(cells) >= _SHARE * rows.num_rows else "text"


def _is_image(cell: Any) -> bool:
    """Bytes, `{bytes, path}` as datasets writes images, or the path of one."""
    if isinstance(cell, dict):
        return "bytes" in cell
    return isinstance(cell, bytes) or (isinstance(cell, str) and _IMAGE_CELL.fullmatch(cell) is not None)
