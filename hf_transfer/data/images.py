"""Pictures as files, bytes and arrays, as 8-bit images of the model's channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer.errors import one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


_DRAFT = 64  # pixels per side, at least
_DEEP = 255  # the highest value of 8 bits


def open_image(value: Any) -> Image:
    """A picture from a path, its bytes, a cell of a `datasets` image column, a picture or an array.

    Of an animation the first frame; turned as its EXIF orientation says.

    Raises:
        ValueError: it cannot be read, or has more pixels than PIL opens (a decompression bomb).
    """
    from PIL import Image as Pixels

    if isinstance(value, dict):  # how `datasets` stores an image in a file
        value = value.get("bytes") or value.get("path")
    with _explained():
        if isinstance(value, str | Path):
            value = Path(value).read_bytes()
        if isinstance(value, bytes):
            return _decoded(value)[0]
        if value is None:
            raise ValueError("there is none")
        return value if isinstance(value, Pixels.Image) else Pixels.fromarray(value)


def glance(content: bytes) -> tuple[Image, tuple[int, int]]:
    """(a picture, whole or, of a JPEG, several times faster and smaller, (width, height) of the whole).

    Raises:
        ValueError: it cannot be read: also one that is cut off is seen.
    """
    with _explained():
        return _decoded(content, draft=True)


def _decoded(content: bytes, draft: bool = False) -> tuple[Image, tuple[int, int]]:
    from PIL import Image as Pixels
    from PIL import ImageOps

    if not content:
        raise ValueError("the file is empty")
    image = Pixels.open(BytesIO(content))
    size = image.size
    if draft:
        image.draft(None, (_DRAFT, _DRAFT))
    image.load()
    return ImageOps.exif_transpose(image), size  # turned as `datasets` does


def undecoded(split: Dataset, inputs: Sequence[str]) -> Dataset:
    """The input columns of a split alone, pictures as they are stored."""
    from datasets import Image

    found = split.select_columns(list(inputs))
    for column in inputs:
        if isinstance(found.features[column], Image):
            found = found.cast_column(column, Image(decode=False))
    return found


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What PIL raises for what is no picture, as one kind of error."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, DecompressionBombError) as error:
        raise ValueError(f"it cannot be read as an image ({one_line(error, 100)})") from error


def to_channels(image: Image, channels: int) -> Image:
    """`image` in colour (3 channels) or grey (1), 8 bits each.

    PIL cuts deeper pixels off at 255: a 16-bit picture would be white. They are scaled instead.
    """
    from PIL import Image as Pixels

    if image.mode == "F" or image.mode.startswith("I"):
        import numpy as np

        values = np.asarray(image).astype(np.float64)
        top = values.max(initial=0)
        scale = _DEEP if image.mode == "F" and top <= 1 else 1 if top <= _DEEP else _DEEP / max(65535, top)
        image = Pixels.fromarray((values * scale).round().clip(0, _DEEP).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")
