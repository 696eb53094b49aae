"""Digests of Arrow columns that do not depend on how the columns are chunked."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.features.hashing import THREADS, Undecidable, hasher

_LONGEST_PATH = 4096


class ColumnDigests:
    """Digests of columns that arrive in pieces.

    A column of lists, texts or structs is split into streams of plain numbers: positions of nulls, lengths, and values.
    In each stream a longer column only appends.

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

    def _update(self, name: str, values: Any) -> None:
        if len(values):  # an empty piece must not create a stream
            self._hashes.setdefault(name, hasher()).update(values)

    def add(self, name: str, array: Any) -> None:
        """Append a piece of column `name`.

        Raises:
            Undecidable: its type is unknown, or it names a file on a server.
        """
        import pyarrow
        import pyarrow.types as kinds

        if isinstance(array, pyarrow.ExtensionArray):
            array = array.storage
        before = self._counts.get(name, 0)
        self._counts[name] = before + len(array)
        if kinds.is_null(array.type):
            return
        if kinds.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.null_count:
            nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)) + before
            self._update(f"{name}.null", nulls.astype(np.int64).tobytes())
            array = array.drop_null()
        if kinds.is_struct(array.type):
            children = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
            for child, values in children.items():
                self.add(f"{name}.{child}", values)
            if set(children) == {"bytes", "path"} and not self.texts_may_be_paths:
                self._add_files(f"{name}.file", children["path"].filter(children["bytes"].is_null()))
        elif kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type):
            self._update(f"{name}.lengths", array.value_lengths().to_numpy().astype(np.int64).tobytes())
            self.add(f"{name}.item", array.flatten())
        else:
            self._add_plain(name, array)

    def _add_plain(self, name: str, array: Any) -> None:
        import pyarrow.types as kinds

        kind = array.type
        if kinds.is_string(kind) or kinds.is_binary(kind):
            self._add_texts(name, array, np.int32)
        elif kinds.is_large_string(kind) or kinds.is_large_binary(kind):
            self._add_texts(name, array, np.int64)
        elif kinds.is_boolean(kind):
            self._update(name, array.to_numpy(zero_copy_only=False).tobytes())
        elif kinds.is_primitive(kind) or kinds.is_decimal(kind) or kinds.is_fixed_size_binary(kind):
            width, values = kind.bit_width // 8, array.buffers()[1]
            if values is not None:
                self._update(name, memoryview(values)[array.offset * width : (array.offset + len(array)) * width])
        else:
            raise Undecidable(kind)

    def _add_texts(self, name: str, array: Any, offset_type: Any) -> None:
        if not len(array):
            return
        _, offsets, values = array.buffers()
        bounds = np.frombuffer(offsets, offset_type)[array.offset : array.offset + len(array) + 1]
        self._update(f"{name}.lengths", np.diff(bounds.astype(np.int64)).tobytes())
        if values is not None:
            self._update(name, memoryview(values)[bounds[0] : bounds[-1]])
        if self.texts_may_be_paths and "binary" not in str(array.type):
            self._add_files(f"{name}.file", array)

    def _add_files(self, name: str, paths: Any) -> None:
        """The content of files: neither size nor modification time says whether it is the same."""
        files = [path for path in paths.to_pylist() if path and len(path) < _LONGEST_PATH]
        with ThreadPoolExecutor(THREADS) as pool:
            for digest in pool.map(_file_digest, files):
                self._update(name, digest)


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
