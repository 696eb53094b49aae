"""What `predict` is given: texts, files, folders and lines of standard input, as a stream of examples.

Nothing is held but the example at hand. Tables are read by the reader of training (`data.rows`).
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Value

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.dialect import convert
from hf_transfer.data.image_paths import IMAGE_COLUMNS, IMAGE_SUFFIXES, UNREADABLE_IMAGES, native
from hf_transfer.data.image_tree import visible_files
from hf_transfer.data.rows import FORMATS, BadRow, format_of, read_rows
from hf_transfer.errors import UserError, nearest, one_line, option
from hf_transfer.tasks.base import Task

TABLES = frozenset(FORMATS)
LINES = frozenset((".txt",))
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Example:
    """One input.

    Attributes:
        shown: what stands under `input` in the answer: the text (two for a pair) or the picture's path.
        values: one per input column, as `Task.encode` takes it; None where the input cannot be read.
        error: why not.
    """

    shown: Any
    values: tuple[Any, ...] | None
    error: str = ""


def example(task: Task, shown: Any, raw: Sequence[Any]) -> Example:
    """An example of raw values, or of the reason why they cannot be read."""
    try:
        values = tuple(task.read(value) for value in raw)
        return Example(shown, None, reason) if (reason := task.wrong(values)) else Example(shown, values)
    except ValueError as error:
        if isinstance(shown, str):  # half a character cannot be printed
            shown = shown.encode("utf-8", "backslashreplace").decode()
        return Example(shown, None, str(error))


def check_inputs(words: Sequence[str], task: Task) -> None:
    """What can be said of inputs without reading them.

    Raises:
        UserError: a file is missing, or of a kind that the task does not read.
    """
    for word in words:
        path = Path(word)
        if word == STANDARD_INPUT or os.path.isdir(word) or (not word and not task.suffixes):
            continue
        supported = TABLES | LINES | task.suffixes
        if _is_pipe(word) and not task.suffixes:
            continue
        if os.path.isfile(word):
            if path.suffix.lower() not in supported and format_of(path) is None:
                kind = "is an image, and the model reads text" if _is_image(path) else "has an unsupported file type"
                raise UserError(f"{word!r} {kind}.", _supported(task, path.suffix.lower()), key="INPUT")
            if path.suffix.lower() in LINES and task.suffixes:
                raise UserError(f"{word!r} holds text, and the model reads images.", key="INPUT")
        elif task.suffixes or (path.suffix.lower() in supported and not any(c.isspace() for c in word)):
            beside = nearest(path.name, os.listdir(path.parent)) if os.path.isdir(path.parent) else ""
            raise UserError(f"there is no file or folder {word!r}.{beside}", key="INPUT")


def read_inputs(words: Sequence[str], task: Task, args: DataArguments) -> Iterator[Example | None]:
    """The examples of all inputs, in order; None where the source has nothing more at the moment.

    Raises:
        UserError: a table is broken or lacks the input column.
    """
    for word in words:
        if word == STANDARD_INPUT:
            yield from _standard_input(task)
        elif os.path.isdir(word):  # os.path takes any text; pathlib stumbles over a long one
            yield from _folder(Path(word), task, args)
        elif os.path.isfile(word) or _is_pipe(word):
            yield from _file(Path(word), task, args)
        else:
            yield example(task, word, [word])


def arrive_slowly(words: Sequence[str]) -> bool:
    """Whether inputs are to be answered as they arrive: lines of standard input or of another pipe."""
    return any(word == STANDARD_INPUT or _is_pipe(word) for word in words)


def _supported(task: Task, suffix: str = "") -> str:
    """The files that can be read, or what makes an image readable."""
    if task.suffixes and suffix in UNREADABLE_IMAGES:
        return UNREADABLE_IMAGES[suffix]
    kinds = TABLES if task.suffixes else TABLES | LINES
    images = "images that PIL opens (.jpg, .png, .webp, .tif, …), " if task.suffixes else ""
    return f"Supported: {images}{', '.join(sorted(kinds))} and folders."


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES or path.suffix.lower() in UNREADABLE_IMAGES


def _is_pipe(word: str) -> bool:
    """Whether it names what a shell's `<(...)` gives."""
    return os.path.exists(word) and not os.path.isfile(word) and not os.path.isdir(word)


def _folder(folder: Path, task: Task, args: DataArguments) -> Iterator[Example | None]:
    kinds = task.suffixes or TABLES | LINES
    unreadable = UNREADABLE_IMAGES if task.suffixes else {}
    files = [
        p
        for p in visible_files(folder)
        if p.suffix.lower() in kinds
        or p.suffix.lower() in unreadable
        or (p.suffix.lower() == ".gz" and format_of(p) and not task.suffixes)
    ]
    if not files:
        raise UserError(f"the folder {str(folder)!r} holds no file to read.", _supported(task), key="INPUT")
    for path in files:
        if remedy := unreadable.get(path.suffix.lower()):
            yield Example(str(path), None, f"{path.suffix} images cannot be read. {remedy}")
        else:
            yield from _file(path, task, args)


def _file(path: Path, task: Task, args: DataArguments) -> Iterator[Example | None]:
    suffix = path.suffix.lower()
    if suffix in task.suffixes:
        yield example(task, str(path), [str(path)])
    elif suffix in LINES or _is_pipe(str(path)):
        with _open(path) as file:
            yield from (example(task, line, [line]) for line in _numbered(path, (line.rstrip("\r\n") for line in file)))
    else:
        yield from _table(path, task, args)


def _standard_input(task: Task) -> Iterator[Example | None]:
    """A line is an example. What has come is given at once: a slow writer gets its answers without filling a batch."""
    if sys.stdin is None:
        raise UserError("INPUT: there is no standard input to read.")
    pending, source = b"", sys.stdin.fileno()
    while chunk := os.read(source, 1 << 16):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield _line(line, task)
        if not _has_more(source):
            yield None
    if pending:
        yield _line(pending, task)


def _has_more(source: int) -> bool:
    """Whether a read would return at once, with bytes or with the end."""
    try:
        return bool(select.select([source], [], [], 0)[0])
    except OSError:  # Windows selects sockets only
        return False


def _line(line: bytes, task: Task) -> Example:
    line = line.rstrip(b"\r")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return Example(line.decode("utf-8", errors="replace"), None, "not valid UTF-8")
    return example(task, text, [text])


# ---- tables --------------------------------------------------------------------------------------------------------


def _table(path: Path, task: Task, args: DataArguments) -> Iterator[Example]:
    columns: tuple[str, ...] = ()
    for number, row in enumerate(_told(path, read_rows(path)), 1):
        if isinstance(row, BadRow):
            yield Example(row.place, None, row.reason)
            continue
        columns = columns or _columns(row, path, task, args)
        missing = [name for name in columns if name not in row]
        if missing:
            yield Example(f"{path}:{number}", None, f"it has no {', '.join(missing)}")
            continue
        raw = [_beside(path, row[name], task) for name in columns]
        shown = raw if len(raw) > 1 else raw[0]
        if task.suffixes and not isinstance(raw[0], str):  # the picture itself
            inside = raw[0].get("path") if isinstance(raw[0], dict) else None
            shown = inside or f"{path}:{number}"
        yield example(task, shown, raw)
    if not columns:
        raise UserError(f"{str(path)!r} holds no examples.", key="INPUT")


def _told(path: Path, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows; an error of reading them is one about the input.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        yield from rows
    except UserError as error:
        raise (error if error.key else error.with_key("INPUT")) from error


def _beside(path: Path, value: Any, task: Task) -> Any:
    """A picture's path that is relative to the table; as it stands where there is no such file."""
    relative = task.suffixes and isinstance(value, str) and not Path(value).is_absolute()
    own = native(value, path.parent) if relative else value
    return str(path.parent / own) if relative and os.path.isfile(path.parent / own) else value


def _columns(row: dict[str, Any], path: Path, task: Task, args: DataArguments) -> tuple[str, ...]:
    given = getattr(args, task.input_key) if task.input_key else None
    names = [given] if isinstance(given, str) else list(given or [])
    missing = [name for name in names if name not in row]
    if missing:
        raise UserError(
            f"{task.input_key}: {str(path)!r} has no column {missing[0]!r}.",
            f"It has {', '.join(row)}; name the one to read with {option(task.input_key)}.{nearest(missing[0], row)}",
        )
    if names:
        return tuple(names)
    if task.suffixes:
        columns = [name for name in IMAGE_COLUMNS if name in row] or (list(row) if len(row) == 1 else [])
        columns = columns[:1]
    else:
        texts = {name: Value("string") for name, value in row.items() if value is None or isinstance(value, str)}
        columns = list(task.input_columns(texts, args))
    if not columns:
        raise UserError(
            f"{task.input_key}: the input column of {str(path)!r} is not plain.", f"Name one of {', '.join(row)}."
        )
    return tuple(columns)


def _open(path: Path, newline: str | None = None) -> Any:
    return path.open(encoding="utf-8-sig", newline=newline)


def _numbered(path: Path, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows; what goes wrong in reading them is told with the place.

    Raises:
        UserError: a row cannot be read.
    """
    number = 0
    try:
        for number, row in enumerate(rows, 1):  # noqa: B007 - the number is told with the error
            yield row
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not text in UTF-8 (after row {number}).", convert(path), key="INPUT"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read after row {number} ({one_line(error, 150)}).", key="INPUT"
        ) from error
