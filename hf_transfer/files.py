"""Writing files atomically, values as JSON, and messages to the user."""

from __future__ import annotations

import datetime
import enum
import json
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


def say(text: str = "") -> None:
    """A line on standard output, at once."""
    print(text, flush=True)


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that the file is whole at every instant."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside and rename, so that the file is whole at every instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whatever is in it (see `as_json`), beside and rename."""
    write_text(path, json.dumps(as_json(value), indent=2, allow_nan=False) + "\n")


@runtime_checkable
class _Tensor(Protocol):
    """What torch's tensors have, which are not imported for this."""

    def tolist(self) -> Any: ...


def as_json(value: Any) -> Any:
    """`value` as JSON can represent it, whatever it is.

    NaN and infinity become None. Numbers, arrays and tensors of numpy and torch become numbers and lists; tuples, sets
    and other iterables lists; dataclasses objects; enumerations their value; dates ISO 8601; paths and everything else
    text.
    """
    if isinstance(value, enum.Enum):
        return as_json(value.value)
    if isinstance(value, np.generic | np.ndarray):
        return _of_numpy(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_as_key(k): as_json(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    if isinstance(value, Set):
        return sorted((as_json(v) for v in value), key=str)
    if isinstance(value, _Tensor) and not isinstance(value, type):
        return as_json(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, type):
        return [as_json(v) for v in value]
    return str(value)


def _of_numpy(value: Any) -> Any:
    if value.dtype.kind in "mM":  # dates, of which `tolist` makes integers where they are finer than a microsecond
        return value.astype(str).tolist()
    if value.dtype == np.longdouble:
        value = value.astype(float)
    return as_json(value.tolist())


def _as_key(key: Any) -> str:
    """A key as text; None, booleans and numbers as `json` writes them."""
    plain = as_json(key)
    return plain if isinstance(plain, str) else json.dumps(plain)
