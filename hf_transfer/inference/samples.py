"""Examples that a run held out, for the page of `demo`: texts, and images as files."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.data.images import encoded, open_image
from hf_transfer.files import write_json
from hf_transfer.inference.predictor import Predictor

VALIDATION = "validation"
FILE, _IMAGES = "examples.json", "examples"


@dataclass(frozen=True)
class Sample:
    """An example.

    Attributes:
        values: a text per input column, or the path of an image.
        label: its true one, in words.
        is_file: whether it is an image.
    """

    values: tuple[str, ...]
    label: str
    is_file: bool = False


def samples_of(predictor: Predictor, count: int, folder: Path) -> list[Sample]:
    """Examples of the validation split of a model's run, drawn by class.

    Args:
        predictor: of the run.
        count: at most so many.
        folder: for the files of images; is made.

    Raises:
        UserError: the data is not known or gone, or it has no validation split.
    """
    if not count:
        return []
    found = predictor.samples(VALIDATION, count)
    if not predictor.task.suffixes:
        return [Sample(tuple(map(str, values)), label) for values, label in found if not predictor.task.wrong(values)]
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for i, (values, label) in enumerate(found):
        try:
            content, suffix = _as_file(encoded(values[0]))
        except ValueError:  # unusable: told where the model is measured
            continue
        path = folder / f"{i}{suffix}"
        path.write_bytes(content)
        kept.append(Sample((str(path.resolve()),), label, is_file=True))
    return kept


def save_samples(samples: Mapping[str, Sequence[Sample]], folder: Path) -> None:
    """Write examples into a folder, the files of images below it.

    Args:
        samples: of each task.
        folder: exists.
    """
    entries: dict[str, list[dict[str, Any]]] = {}
    for i, (name, some) in enumerate(samples.items()):
        entries[name] = []
        for sample in some:
            values = list(sample.values)
            if sample.is_file:
                path = folder / _IMAGES / f"{i}-{Path(values[0]).name}"
                path.parent.mkdir(exist_ok=True)
                shutil.copy(values[0], path)
                values = [path.relative_to(folder).as_posix()]
            entries[name].append({"values": values, "label": sample.label, "is_file": sample.is_file})
    write_json(folder / FILE, entries)


def load_samples(folder: Path) -> dict[str, list[Sample]]:
    """What `save_samples` wrote; nothing where it wrote nothing."""
    path = folder / FILE
    if not path.is_file():
        return {}
    return {
        name: [
            Sample(
                tuple(str(folder.resolve() / v) if one["is_file"] else v for v in one["values"]),
                one["label"],
                one["is_file"],
            )
            for one in some
        ]
        for name, some in json.loads(path.read_text(encoding="utf-8")).items()
    }


def _as_file(content: bytes) -> tuple[bytes, str]:
    """(an image's file, its suffix).

    Raises:
        ValueError: it is not a readable image.
    """
    from PIL import Image as Pixels

    open_image(content)
    return content, f".{(Pixels.open(io.BytesIO(content)).format or 'png').lower()}"
