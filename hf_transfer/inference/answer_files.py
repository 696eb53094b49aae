"""Answers as a table: from JSON lines to CSV or Parquet, with a column per score.

The lines are read twice, the first time for the columns that occur, and only a group of rows is in memory.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

_ROWS = 1024  # of a group
_SCORE = "score_"
_TEXTS = pyarrow.list_(pyarrow.string())
# Columns before and after those of the scores.
_FIRST = {
    "input": pyarrow.string(),
    "input_pair": pyarrow.string(),
    "label": pyarrow.string(),
    "score": pyarrow.float64(),
    "labels": _TEXTS,
    "value": pyarrow.float64(),
    "set": _TEXTS,
    "abstains": pyarrow.bool_(),
}
_LAST = {
    "clipped_pixels": pyarrow.int64(),
    "features": pyarrow.list_(pyarrow.float64()),
    "error": pyarrow.string(),
}


def write_table(lines: Path, path: Path, names: Sequence[str], form: str) -> None:
    """Write answers as a table.

    Args:
        lines: a file of answers as JSON, see `Predictor.predict`.
        path: the table.
        names: of the model's labels, in the order of their columns.
        form: `.csv`, where lists are JSON, or `.parquet`.
    """
    scores = {f"{_SCORE}{name}": pyarrow.float64() for name in names}
    kinds = {**_FIRST, **scores, **_LAST}
    seen = {column for row in _rows(lines) for column in row}
    schema = pyarrow.schema([(column, kind) for column, kind in kinds.items() if column in seen])
    write = _write_csv if form == ".csv" else _write_parquet
    write(path, _rows(lines), schema)


def _rows(lines: Path) -> Iterator[dict[str, Any]]:
    """The answers without nested objects."""
    with lines.open(encoding="utf-8") as file:
        for line in file:
            answer = json.loads(line)
            given, scores = answer.pop("input"), answer.pop("scores", {})
            shown = dict(zip(("input", "input_pair"), given if isinstance(given, list) else [given], strict=False))
            yield {**shown, **answer, **{f"{_SCORE}{name}": score for name, score in scores.items()}}


def _write_csv(path: Path, rows: Iterator[dict[str, Any]], schema: pyarrow.Schema) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(schema.names)
        writer.writerows([_cell(row.get(column)) for column in schema.names] for row in rows)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list) else value


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], schema: pyarrow.Schema) -> None:
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
