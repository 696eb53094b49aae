"""Writing files atomically, and messages to the user."""

from __future__ import annotations

from pathlib import Path


def say(text: str = "") -> None:
    """A line on standard output, at once."""
    print(text, flush=True)


def write_json(path: Path, text: str) -> None:
    """Write beside and rename, so that the file is whole at every instant."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside and rename, so that the file is whole at every instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)
