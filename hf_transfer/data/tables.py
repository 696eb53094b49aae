"""Tables as Arrow: CSV as text, JSON and Parquet with their own types, each column with one type over all its files.

Files up to `_IN_MEMORY` bytes are held in memory. Larger ones are converted once into an Arrow file in the datasets
cache, under the digest of their content, and memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from hf_transfer.data.rows import BadRow, DelimitedFile, explained, format_of, json_rows, several_columns
from hf_transfer.errors import UserError

CHUNK = 10_000  # rows converted at a time at most
_CHUNK_CHARACTERS = 8 << 20  # and about as many characters: documents can be long
_BLOCK = 100  # rows after which they are counted
_IN_MEMORY = 256 << 20
_VERSION = "2"  # of the cached files
_MAX_SHOWN = 3


@dataclass
class Read:
    """One file, read.

    Attributes:
        path: the file.
        table: its rows.
        notes: messages for the user.
        bad: rows that were left out.
    """

    path: Path
    table: Dataset
    notes: list[str] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def read_files(paths: Sequence[Path], skip_bad: bool) -> list[Read]:
    """The files of one split, with the same columns and types.

    Args:
        paths: files of one format.
        skip_bad: leave out rows that do not fit (they are in `Read.bad`) instead of stopping.

    Raises:
        UserError: a file cannot be read, a row does not fit, or the files have different columns.
    """
    form = format_of(paths[0])
    if form == "csv":
        return _same_columns([_read(path, skip_bad, None) for path in paths])
    schema, mixed = _json_schema(paths, skip_bad) if form == "json" else (_parquet_schema(paths), [])
    files = [_read(path, skip_bad, schema) for path in paths]
    files[0].notes += [f"Column {name!r} holds several kinds of values; all are read as text." for name in mixed]
    return files


def _read(path: Path, skip_bad: bool, schema: pa.Schema | None) -> Read:
    with explained(path):
        if path.stat().st_size <= _IN_MEMORY:
            chunks = _Chunks(path, skip_bad, schema)
            table = pa.Table.from_batches(list(chunks), chunks.schema)
            read = Read(path, Dataset(table), chunks.notes, chunks.bad)
        else:
            read = _cached(path, skip_bad, schema)
    if read.bad and not skip_bad:
        _refuse(read.bad)
    if not len(read.table):
        if read.bad:
            raise UserError(f"{str(path)!r} has no row that fits ({read.bad[0].place}: {read.bad[0].reason}).")
        raise UserError(f"{str(path)!r} has no examples.", "It has only a header, or nothing at all.")
    return read


def _refuse(bad: Sequence[BadRow]) -> None:
    more = f" ({len(bad):,} such rows: {', '.join(b.place for b in bad[:_MAX_SHOWN])}{', …' if len(bad) > 3 else ''})"
    raise UserError(
        f"{bad[0].place}: {bad[0].reason}{more if len(bad) > 1 else ''}.",
        "Correct the file, or set on_bad_example: skip to leave such rows out.",
    )


class _Chunks:
    """Record batches of a file; `notes` and `bad` are complete once it was iterated over."""

    def __init__(self, path: Path, skip_bad: bool, schema: pa.Schema | None):
        self.path, self.skip_bad, self.bad = path, skip_bad, list[BadRow]()
        self.delimited = DelimitedFile(path, skip_bad) if format_of(path) == "csv" else None
        self.notes = list(self.delimited.notes) if self.delimited else []
        columns = [(name, pa.string()) for name in self.delimited.names] if self.delimited else schema
        self.schema: pa.Schema = pa.schema(columns)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        if self.delimited:
            for rows in _chunked(self._good(self.delimited.rows())):
                columns = [pa.array(cells, pa.string()) for cells in zip(*rows, strict=True)]
                yield pa.RecordBatch.from_arrays(columns, schema=self.schema)
        elif format_of(self.path) == "json":
            for rows in _chunked(self._good(json_rows(self.path, self.skip_bad))):
                arrays = [array([row.get(f.name) for row in rows], f, self.path) for f in self.schema]
                yield pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        else:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=CHUNK):
                    table = pa.Table.from_batches([batch]).select(self.schema.names)
                    table.validate(full=True)  # texts in UTF-8
                    yield from table.cast(self.schema).to_batches()

    def _good(self, rows: Iterable[Any]) -> Iterator[Any]:
        for row in rows:
            if isinstance(row, BadRow):
                self.bad.append(row)
            else:
                yield row


def _chunked(rows: Iterator[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    characters = 0
    while block := list(islice(rows, _BLOCK)):
        chunk += block
        cells = (cell for row in block for cell in (row.values() if isinstance(row, dict) else row))
        characters += sum(len(cell) for cell in cells if isinstance(cell, str))
        if len(chunk) >= CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _cached(path: Path, skip_bad: bool, schema: pa.Schema | None) -> Read:
    """A large file, converted once and memory-mapped."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_transfer"
    name = _digest(path, f"{_VERSION} {skip_bad} {schema}")
    arrow, about = folder / f"{name}.arrow", folder / f"{name}.json"
    if not (arrow.is_file() and about.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        chunks, beside = _Chunks(path, skip_bad, schema), folder / f"{name}.{os.getpid()}.part"
        try:
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, chunks.schema) as stream:
                for batch in chunks:
                    stream.write_batch(batch)
            bad = [[b.place, b.reason] for b in chunks.bad]
            about.write_text(json.dumps({"notes": chunks.notes, "bad": bad}), encoding="utf-8")
            beside.replace(arrow)
        finally:
            beside.unlink(missing_ok=True)
    said = json.loads(about.read_text(encoding="utf-8"))
    return Read(path, Dataset.from_file(str(arrow)), said["notes"], [BadRow(*bad) for bad in said["bad"]])


def _digest(path: Path, options: str) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"{path.name} {options}".encode())
    return digest.hexdigest()[:32]


def _same_columns(reads: list[Read]) -> list[Read]:
    """The files with their columns in the order of the first.

    Raises:
        UserError: one has other columns.
    """
    names = reads[0].table.column_names
    for read in reads:
        _check_columns(read.path, read.table.column_names, reads[0].path, names)
        read.table = read.table.select_columns(names)
    return reads


def _check_columns(path: Path, names: Sequence[str], first: Path, wanted: Sequence[str]) -> None:
    """Raises:
    UserError: a file has other columns than the first one.
    """
    if odd := sorted(set(names) ^ set(wanted)):
        raise UserError(
            f"the files of a split have different columns: {path.name!r} {'has' if odd[0] in names else 'has not'} "
            f"{odd[0]!r}, unlike {first.name!r}.",
            "Give all of them the same columns.",
        )


# ---- types ---------------------------------------------------------------------------------------------------------


def _parquet_schema(paths: Sequence[Path]) -> pa.Schema:
    schemas = []
    for path in paths:
        with explained(path):
            schemas.append(_plain(pq.read_schema(path)))
        if repeated := [name for name, count in Counter(schemas[-1].names).items() if count > 1]:
            raise several_columns(path, repeated[0])
    for path, schema in zip(paths, schemas, strict=True):
        _check_columns(path, schema.names, paths[0], schemas[0].names)
    try:
        return pa.unify_schemas(schemas, promote_options="permissive") if len(schemas) > 1 else schemas[0]
    except pa.ArrowException as error:
        raise UserError(f"the files of a split have columns of different types ({error}).") from error


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with the values of pandas' categories in place of their codes, and texts in place of views of them."""
    return pa.schema([f.with_type(_plain_type(f.type)) for f in schema], schema.metadata)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    views = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    return views.get(kind, kind)


def _json_schema(paths: Sequence[Path], skip_bad: bool) -> tuple[pa.Schema, list[str]]:
    """(one type per column over all rows of all files, the columns of several kinds of scalars, which are text).

    Raises:
        UserError: a file cannot be read, or a column mixes lists or objects with other values.
    """
    types: dict[str, pa.DataType] = {}
    kinds: dict[str, set[type]] = {}
    for path in paths:
        rows = (row for row in json_rows(path, skip_bad) if isinstance(row, dict))
        for chunk in _chunked(rows):
            for name in dict.fromkeys(name for row in chunk for name in row):
                values = [row.get(name) for row in chunk]
                kinds.setdefault(name, set()).update(map(type, values))
                _add_type(types, name, values, path)
    return _schema(types), [n for n, t in types.items() if pa.types.is_string(t) and kinds[n] - {str, type(None)}]


def json_types(rows: Sequence[dict[str, Any]], path: Path) -> pa.Schema:
    """The types of the columns of `rows`, which come from `path`."""
    types: dict[str, pa.DataType] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        _add_type(types, name, [row.get(name) for row in rows], path)
    return _schema(types)


def _add_type(types: dict[str, pa.DataType], name: str, values: Sequence[Any], path: Path) -> None:
    found = _type_of(values, name, path)
    types[name] = _common(types[name], found, name, path) if name in types else found


def _schema(types: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([(name, pa.string() if pa.types.is_null(t) else t) for name, t in types.items()])


def _type_of(values: Sequence[Any], name: str, path: Path) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError) as error:
        if any(isinstance(v, list | dict) for v in values):
            raise _mixed(name, path) from error
        return pa.string()


def _common(a: pa.DataType, b: pa.DataType, name: str, path: Path) -> pa.DataType:
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    try:
        (common,) = pa.unify_schemas([pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive").types
        return common
    except pa.ArrowException as error:
        if pa.types.is_nested(a) or pa.types.is_nested(b):
            raise _mixed(name, path) from error
        return pa.string()


def _mixed(name: str, path: Path) -> UserError:
    return UserError(
        f"column {name!r} of {str(path)!r} mixes lists or objects with other values.",
        "Write all of its values in one form.",
    )


def array(values: list[Any], column: pa.Field, path: Path) -> pa.Array:
    """Values of a JSON column as Arrow.

    Raises:
        UserError: one is not of the column's type.
    """
    if pa.types.is_string(column.type):
        values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    try:
        return pa.array(values, column.type)
    except pa.ArrowException as error:
        raise UserError(f"column {column.name!r} of {str(path)!r} mixes kinds of values ({error}).") from error
