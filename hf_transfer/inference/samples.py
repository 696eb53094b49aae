"""Examples that a run held out, for the page of `demo`: texts, and images as files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from hf_transfer.data.images import encoded, open_image
from hf_transfer.inference.predictor import Predictor

VALIDATION = "validation"


@dataclass(frozen=True)
class Sample:
    """An example.

    Attributes:
        values: a text per input column, or the path of an image.
        label: its true one, in words.
    """

    values: tuple[str, ...]
    label: str


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
        kept.append(Sample((str(path.resolve()),), label))
    return kept


def _as_file(content: bytes) -> tuple[bytes, str]:
    """(an image's file, its suffix).

    Raises:
        ValueError: it is not a readable image.
    """
    from PIL import Image as Pixels

    open_image(content)
    return content, f".{(Pixels.open(io.BytesIO(content)).format or 'png').lower()}"
