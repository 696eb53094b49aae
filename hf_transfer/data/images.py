"""Image files, bytes and arrays as 8-bit PIL images with the model's number of channels."""

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


_DRAFT = 64  # minimum pixels per side
_MAX_8_BIT = 255


def open_image(value: Any) -> Image:
    """An image from a path, encoded bytes, a cell of a `datasets` image column, a PIL image or an array.

    Files are rotated by their EXIF orientation; an animation gives its first frame.

    Raises:
        ValueError: it is not a readable image, or has more pixels than PIL allows (a decompression bomb).
    """
    from PIL import Image as Pixels

    if isinstance(value, dict):  # how `datasets` stores an undecoded image
        value = value.get("bytes") or value.get("path")
    with _explained():
        if isinstance(value, str | Path):
            value = Path(value).read_bytes()
        if isinstance(value, bytes):
            return _decoded(value)[0]
        if value is None:
            raise ValueError("no value")
        return value if isinstance(value, Pixels.Image) else Pixels.fromarray(value)


def glance(content: bytes) -> tuple[Image, tuple[int, int]]:
    """(the image, (width, height) at full size); a JPEG is decoded at reduced size, which is several times faster.

    Raises:
        ValueError: it is not a readable image, or is truncated.
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
    return ImageOps.exif_transpose(image), size  # as `datasets` does


def undecoded(split: Dataset, inputs: Sequence[str]) -> Dataset:
    """The input columns of a split, without decoding images."""
    from datasets import Image

    selected = split.select_columns(list(inputs))
    for column in inputs:
        if isinstance(selected.features[column], Image):
            selected = selected.cast_column(column, Image(decode=False))
    return selected


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn everything PIL raises for unreadable images into `ValueError`."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, DecompressionBombError) as error:
        raise ValueError(f"cannot be read as an image ({one_line(error, 100)})") from error


def to_channels(image: Image, channels: int) -> Image:
    """`image` as 8-bit RGB (3 channels) or grayscale (1).

    PIL clips deeper pixels at 255, which would turn a 16-bit image white; they are rescaled instead.
    """
    from PIL import Image as Pixels

    if image.mode == "F" or image.mode.startswith("I"):
        import numpy as np

        values = np.asarray(image).astype(np.float64)
        top = values.max(initial=0)
        scale = (
            _MAX_8_BIT if image.mode == "F" and top <= 1 else 1 if top <= _MAX_8_BIT else _MAX_8_BIT / max(65535, top)
        )
        image = Pixels.fromarray((values * scale).round().clip(0, _MAX_8_BIT).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")
