"""Digests of Arrow columns, as a whole or row by row, that do not depend on how the columns are chunked.

A column of lists, texts or structs is split into streams of plain numbers: counts, positions of nulls, lengths, and
values. In each stream a longer column only appends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.layers.hashing import THREADS, Undecidable, hasher

_LONGEST_PATH = 4096
_COUNT, _NULL = "count", "null"  # streams of a column, next to its values


@dataclass(frozen=True)
class _Stream:
    """Plain numbers of some rows.

    Attributes:
        column: whose numbers these are.
        part: `count`, `null` (positions within the row), `lengths`, `file`, or empty for the values.
        values: bytes of all rows; (rows,) numbers of elements for `count`.
        bounds: (rows + 1,) where each row begins in `values`.
    """

    column: str
    part: str
    values: Any
    bounds: np.ndarray[Any, Any]


class ColumnDigests:
    """Digests of columns that arrive in pieces.

    Args:
        texts_may_be_paths: whether a text that names a file stands for the content of that file too. The path of an
            image always does.
    """

    def __init__(self, texts_may_be_paths: bool):
        self.texts_may_be_paths = texts_may_be_paths
        self._hashes: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def digests(self) -> dict[str, str]:
        """{stream: digest}, and {column.count: number of rows}."""
        counts = {f"{name}.count": str(count) for name, count in self._counts.items()}
        return {name: digest.hexdigest() for name, digest in self._hashes.items()} | counts

    def add(self, name: str, array: Any) -> None:
        """Append a piece of column `name`.

        Raises:
            Undecidable: its type is unknown, or it names a file on a server.
        """
        everything = np.array([0, len(array)], np.int64)
        before = dict(self._counts)
        for stream in _streams(name, array, everything, self.texts_may_be_paths):
            if stream.part == _COUNT:
                self._counts[stream.column] = self._counts.get(stream.column, 0) + int(stream.values[0])
                continue
            values = stream.values
            if stream.part == _NULL:
                values = (np.frombuffer(values, np.int64) + before.get(stream.column, 0)).tobytes()
            if len(values):  # an empty piece must not create a stream
                label = f"{stream.column}.{stream.part}".rstrip(".")
                self._hashes.setdefault(label, hasher()).update(values)


def row_digests(columns: Mapping[str, Any], texts_may_be_paths: bool) -> list[bytes]:
    """For each row of some Arrow arrays of equal length, 16 bytes that depend on its own content alone.

    Args:
        columns: {name: array}.
        texts_may_be_paths: as in `ColumnDigests`.

    Raises:
        Undecidable: a type is unknown, or a file is on a server.
    """
    count = len(next(iter(columns.values())))
    hashes = [hasher() for _ in range(count)]
    for name in sorted(columns):
        singly = np.arange(count + 1, dtype=np.int64)
        for stream in _streams(name, columns[name], singly, texts_may_be_paths):
            label = f"{stream.column}.{stream.part} ".encode()
            if stream.part == _COUNT:
                for own, number in zip(hashes, stream.values.tolist(), strict=True):
                    own.update(label + b"%d " % number)
                continue
            view, bounds = memoryview(stream.values), stream.bounds.tolist()
            for own, begin, end in zip(hashes, bounds, bounds[1:], strict=False):
                if end > begin:  # which streams are empty for all rows depends on the other rows
                    own.update(label + b"%d " % (end - begin))
                    own.update(view[begin:end])
    return [own.digest() for own in hashes]


# ---- streams ---------------------------------------------------------------------------------------------------------


def _streams(name: str, array: Any, bounds: np.ndarray[Any, Any], texts_may_be_paths: bool) -> Iterator[_Stream]:
    """The streams of an array whose elements `bounds[r]` to `bounds[r + 1]` belong to row r."""
    import pyarrow
    import pyarrow.types as kinds

    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    yield _Stream(name, _COUNT, np.diff(bounds), bounds)
    if kinds.is_null(array.type):
        return
    if kinds.is_dictionary(array.type):
        array = array.dictionary_decode()
    nulls = np.zeros(0, np.int64)
    if array.null_count:
        nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).astype(np.int64)
        array = array.drop_null()
    before = np.searchsorted(nulls, bounds)
    relative = nulls - np.repeat(bounds[:-1], np.diff(before))
    yield _Stream(name, _NULL, relative.tobytes(), before * 8)
    bounds = bounds - before
    if kinds.is_struct(array.type):
        children = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
        for child, values in children.items():
            yield from _streams(f"{name}.{child}", values, bounds, texts_may_be_paths)
        if set(children) == {"bytes", "path"} and not texts_may_be_paths:
            without = children["bytes"].is_null()
            kept = np.concatenate([[0], np.cumsum(without.to_numpy(zero_copy_only=False))])
            yield _files(f"{name}.file", children["path"].filter(without), kept[bounds])
    elif kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type):
        lengths = array.value_lengths().to_numpy().astype(np.int64)
        yield _Stream(name, "lengths", lengths.tobytes(), bounds * 8)
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        yield from _streams(f"{name}.item", array.flatten(), ends[bounds], texts_may_be_paths)
    else:
        yield from _plain(name, array, bounds, texts_may_be_paths)


def _plain(name: str, array: Any, bounds: np.ndarray[Any, Any], texts_may_be_paths: bool) -> Iterator[_Stream]:
    import pyarrow.types as kinds

    kind = array.type
    if kinds.is_string(kind) or kinds.is_binary(kind):
        yield from _texts(name, array, bounds, np.int32, texts_may_be_paths)
    elif kinds.is_large_string(kind) or kinds.is_large_binary(kind):
        yield from _texts(name, array, bounds, np.int64, texts_may_be_paths)
    elif kinds.is_boolean(kind):
        yield _Stream(name, "", array.to_numpy(zero_copy_only=False).tobytes(), bounds)
    elif kinds.is_primitive(kind) or kinds.is_decimal(kind) or kinds.is_fixed_size_binary(kind):
        width, values = kind.bit_width // 8, array.buffers()[1]
        own = b"" if values is None else memoryview(values)[array.offset * width : (array.offset + len(array)) * width]
        yield _Stream(name, "", own, bounds * width)
    else:
        raise Undecidable(kind)


def _texts(
    name: str, array: Any, bounds: np.ndarray[Any, Any], offset_type: Any, texts_may_be_paths: bool
) -> Iterator[_Stream]:
    if not len(array):
        yield _Stream(name, "lengths", b"", bounds)
        return
    _, offsets, values = array.buffers()
    ends = np.frombuffer(offsets, offset_type)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    yield _Stream(name, "lengths", np.diff(ends).tobytes(), bounds * 8)
    if values is not None:
        yield _Stream(name, "", memoryview(values)[ends[0] : ends[-1]], ends[bounds] - ends[0])
    if texts_may_be_paths and "binary" not in str(array.type):
        yield _files(f"{name}.file", array, bounds)


def _files(name: str, paths: Any, bounds: np.ndarray[Any, Any]) -> _Stream:
    """The content of files: neither size nor modification time says whether it is the same."""
    names = paths.to_pylist()
    is_file = np.array([bool(path) and len(path) < _LONGEST_PATH for path in names], bool)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_file_digest, (path for path, own in zip(names, is_file, strict=True) if own)))
    ends = np.concatenate([[0], np.cumsum(is_file)]).astype(np.int64)
    return _Stream(name, "", b"".join(digests), ends[bounds] * 16)


def _file_digest(path: str) -> bytes:
    """Of a file's content; zeros for a text that names no file.

    Raises:
        Undecidable: the content is on a server, and may change there.
    """
    if "://" in path and "\n" not in path and " " not in path:
        raise Undecidable(path)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, hasher).digest()
    except (OSError, ValueError):
        return bytes(16)
