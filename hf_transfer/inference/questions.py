"""What a request to `serve` asks: read from JSON or from uploads, checked against the limits, never against the disk.

A text is a text even where it is the name of a file: a request reads nothing from the server's disk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from hf_transfer.config.arguments.serving import Limits
from hf_transfer.errors import UserError, nearest, one_line, shortened
from hf_transfer.inference.answering import Answering
from hf_transfer.inference.inputs import Example, example
from hf_transfer.inference.served import Served

BAD_REQUEST, TOO_LARGE, WRONG_TYPE, INVALID = 400, 413, 415, 422
KEYS = ("inputs", "task", "top_k")
# What is read from uploads. PIL opens more, some of it with other programs, as EPS with Ghostscript.
IMAGES = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_SHOWN = 40  # characters of a value in a message


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        error: what is wrong.
        fix: what to do about it.
    """

    def __init__(self, status: int, error: str, fix: str = ""):
        super().__init__(error)
        self.status, self.error, self.fix = status, error, fix


@dataclass(frozen=True)
class Question:
    """A checked request.

    Attributes:
        tasks: names.
        several: whether a list of tasks was given: an answer is then `{task: answer}`.
        top_k: only so many scores; None for all.
        inputs: for each task the inputs, each what is shown of it and its raw values.
    """

    tasks: tuple[str, ...]
    several: bool
    top_k: int | None
    inputs: dict[str, list[tuple[Any, list[Any]]]]


def of_json(body: bytes, served: Served, limits: Limits) -> Question:
    """The question of a JSON body: `{"inputs": …, "task": …, "top_k": …}`.

    Raises:
        Refused: it is not JSON, a key or value is wrong, a limit is exceeded, or a task reads images.
    """
    try:
        asked = json.loads(body, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise Refused(
            BAD_REQUEST, f"The body is not JSON ({one_line(error, 100)}).", 'Send {"inputs": ["a text"]}.'
        ) from error
    if not isinstance(asked, dict):
        raise Refused(INVALID, "The body is not a JSON object.", 'Send {"inputs": ["a text"]}.')
    for key in asked:
        _check_key(key)
    if "inputs" not in asked:
        raise Refused(INVALID, "inputs is missing.", 'Send {"inputs": ["a text"]}.')
    tasks, several = _tasks(asked.get("task"), served)
    if image := next((name for name in tasks if served[name].task.suffixes), None):
        raise Refused(
            WRONG_TYPE,
            f"task {image!r} reads images, and JSON holds text.",
            "Upload files as multipart/form-data in fields named inputs: curl -F inputs=@photo.jpg",
        )
    given = asked["inputs"]
    items = given if isinstance(given, list) else [given]
    _check_count(len(items), len(tasks), limits)
    inputs = {
        name: [raw_text(item, f"inputs[{i}]", served[name], limits) for i, item in enumerate(items)] for name in tasks
    }
    return Question(tasks, several, _top_k(asked.get("top_k")), inputs)


def of_form(
    files: Sequence[tuple[str, bytes]], fields: Iterable[tuple[str, str]], served: Served, limits: Limits
) -> Question:
    """The question of a form: uploads in fields named `inputs`; `task`, which may stand several times; `top_k`.

    Args:
        files: (name, content) of the uploads.
        fields: (name, value) of the others.
        served: the tasks.
        limits: what it may hold.

    Raises:
        Refused: a field is wrong, a limit is exceeded, an upload is no image, or a task reads text.
    """
    named: dict[str, list[str]] = {}
    for key, value in fields:
        _check_key(key)
        if key == "inputs":
            raise Refused(
                INVALID, "inputs: a field of the form is no upload.", "Send a file: curl -F inputs=@photo.jpg"
            )
        named.setdefault(key, []).append(value)
    given = named.get("task", [])
    tasks, several = _tasks(given if len(given) > 1 else next(iter(given), None), served)
    if text := next((name for name in tasks if not served[name].task.suffixes), None):
        raise Refused(WRONG_TYPE, f"task {text!r} reads text, not files.", 'Send JSON: {"inputs": ["a text"]}.')
    if not files:
        raise Refused(INVALID, "inputs is missing.", "Upload a file: curl -F inputs=@photo.jpg")
    _check_count(len(files), len(tasks), limits)
    for i, (name, content) in enumerate(files):
        check_image(f"inputs[{i}] ({shortened(name, _SHOWN)})", content, limits)
    if len(named.get("top_k", ())) > 1:
        raise Refused(INVALID, "top_k was given twice.")
    said = next(iter(named.get("top_k", ())), None)
    top_k = _top_k(int(said) if said and said.isascii() and said.isdigit() else said)
    inputs: list[tuple[Any, list[Any]]] = [(name, [content]) for name, content in files]
    return Question(tasks, several, top_k, dict.fromkeys(tasks, inputs))


def examples(predictor: Answering, inputs: Iterable[tuple[Any, list[Any]]]) -> Iterable[Example]:
    """The examples of a task's inputs, read when they are asked for: images are large once decoded."""
    return (example(predictor.task, shown, raw) for shown, raw in inputs)


def raw_text(item: Any, place: str, predictor: Answering, limits: Limits) -> tuple[Any, list[Any]]:
    """(what is shown of an input, its raw values): a text, a pair as a list of two, or an object by column.

    Args:
        item: as it was given.
        place: what to call it in an error.
        predictor: of the task.
        limits: what it may hold.

    Raises:
        Refused: it is none of them, or too long.
    """
    columns = predictor.columns
    if isinstance(item, dict):
        if lacking := [name for name in columns if name not in item]:
            raise Refused(INVALID, f"{place}: it has no {' and no '.join(lacking)}.", f"Columns: {', '.join(columns)}.")
        if not columns and len(item) != 1:
            raise Refused(INVALID, f"{place}: the model does not know its columns.", "Send a text, or a list of two.")
        item = [item[name] for name in columns] if columns else list(item.values())
        item = item[0] if len(item) == 1 else item
    raw = item if isinstance(item, list) else [item]
    if not 1 <= len(raw) <= 2 or not all(isinstance(text, str) for text in raw):
        raise Refused(
            INVALID, f"{place}: it is not a text.", "An input is a text, a pair [text, text], or {column: text}."
        )
    if (longest := max(map(len, raw))) > limits.max_characters:
        raise Refused(
            TOO_LARGE, f"{place}: {longest:,} characters exceed the limit of {limits.max_characters:,} per text."
        )
    return (raw if len(raw) > 1 else raw[0]), raw


def check_image(place: str, content: bytes, limits: Limits) -> None:
    """Check what the header of an image says, before it is decoded.

    Args:
        place: what to call it in an error.
        content: of its file.
        limits: what it may hold.

    Raises:
        Refused: it is no image of a supported format, or has too many pixels.
    """
    from PIL import Image as Pixels

    Pixels.init()
    try:
        image = Pixels.open(BytesIO(content), formats=[name for name in IMAGES if name in Pixels.OPEN])
    except Pixels.DecompressionBombError as error:
        raise Refused(TOO_LARGE, f"{place}: {one_line(error, 100)}") from error
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
        said = "the file is empty" if not content else "it is not an image of a supported format"
        raise Refused(WRONG_TYPE, f"{place}: {said}.", f"Supported: {', '.join(IMAGES)}.") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise Refused(
            TOO_LARGE,
            f"{place}: {width:,} × {height:,} pixels exceed the limit of {limits.max_pixels:,}.",
            "Send a smaller image.",
        )


# ---- details ----


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} was given twice")
    return values


def _check_key(key: str) -> None:
    if key not in KEYS:
        raise Refused(
            INVALID, f"Unknown key {shortened(key, _SHOWN)!r}.", f"Keys: {', '.join(KEYS)}.{nearest(key, KEYS)}"
        )


def _tasks(given: Any, served: Served) -> tuple[tuple[str, ...], bool]:
    """(the tasks that are asked for, whether a list of them was given)."""
    every = ", ".join(served.names)
    if given is None:
        if len(served.names) > 1:
            raise Refused(INVALID, "task is missing.", f"Name one or several of {every}.")
        return served.names, False
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) for name in names):
        raise Refused(INVALID, "task: it is not the name of a task or a list of names.", f"Tasks: {every}.")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise Refused(
                INVALID, f"task: {name!r} was given twice.", "Name each once: it is answered for every input."
            )
        try:
            served[name]
        except UserError as error:
            raise Refused(INVALID, error.message, error.fix) from error
    return tuple(names), isinstance(given, list)


def _top_k(given: Any) -> int | None:
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return given
    raise Refused(INVALID, f"top_k: {shortened(given, _SHOWN)!r} is not a positive whole number.")


def _check_count(count: int, tasks: int, limits: Limits) -> None:
    if not count:
        raise Refused(INVALID, "inputs: the list is empty.")
    if count * tasks > limits.max_inputs:
        each = f" for {tasks} tasks" if tasks > 1 else ""
        raise Refused(
            TOO_LARGE,
            f"{count:,} inputs{each} exceed the limit of {limits.max_inputs:,} per request.",
            "Send several requests.",
        )
