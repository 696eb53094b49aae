"""Image files, bytes and arrays as PIL images, and those as 8-bit images with the model's number of channels."""

from __future__ import annotations

import base64
import contextlib
import re
import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer.errors import one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Range = tuple[float, float]  # lowest and highest value of float and 32-bit integer images
# Range of an image whose model says none, by PIL's mode: float images and 32-bit integer ones.
DEFAULT_RANGE: dict[str, Range] = {"F": (0.0, 1.0), "I": (0.0, 255.0)}
_DRAFT = 64  # minimum pixels per side
_LOSSLESS = 64  # pixels per side of a picture for a page up to which JPEG would show
_MAX_8_BIT, _MAX_16_BIT = 255, 65535
_ORIENTATION = 0x0112
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")  # in PIL's messages
_FORMATS_OF_16_BITS = ("PNG", "PPM")  # PIL gives their 16-bit images in its 32-bit mode (PNG: before version 11)


def open_image(value: Any) -> Image:
    """An image from a path, encoded bytes, a cell of a `datasets` image column, a PIL image or an array.

    Images are rotated by their EXIF orientation; an animation gives its first frame.

    Raises:
        ValueError: it is not a readable image, has NaN or infinite pixels, or has more pixels than PIL allows (a
            decompression bomb).
    """
    from PIL import Image as Pixels

    with _explained():
        if isinstance(value, Pixels.Image):
            return _upright(value)
        if isinstance(value, dict | str | Path | bytes | bytearray | memoryview) or value is None:
            return _decoded(encoded(value))[0]
        return _upright(_from_array(value))


def encoded(value: Any) -> bytes:
    """The bytes of an image file: of a path, of bytes, or of a cell of a `datasets` image column.

    Raises:
        ValueError: there are none, or the file cannot be read.
    """
    if isinstance(value, dict):  # how `datasets` stores an undecoded image
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if value is None:
        raise ValueError("cannot be read as an image (no value)")
    try:
        return Path(value).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"cannot be read as an image ({one_line(error, 100)})") from error


def glance(content: bytes) -> tuple[Image, tuple[int, int]]:
    """(the image, (width, height) at full size); a JPEG is decoded at reduced size, which is several times faster.

    Raises:
        ValueError: it is not a readable image, or is truncated.
    """
    with _explained():
        return _decoded(content, draft=True)


def undecoded(split: Dataset, inputs: Sequence[str]) -> Dataset:
    """The input columns of a split, without decoding images."""
    from datasets import Image

    selected = split.select_columns(list(inputs))
    for column in inputs:
        if isinstance(selected.features[column], Image):
            selected = selected.cast_column(column, Image(decode=False))
    return selected


def is_deep(image: Image) -> bool:
    """Whether the values of an image have no range of their own: float and 32-bit integer images."""
    return image.mode in DEFAULT_RANGE


def extremes(image: Image) -> Range:
    """The lowest and the highest value of a single-channel image."""
    low, high = image.getextrema()
    return float(low), float(high)  # type: ignore[arg-type]  # of several channels it gives pairs


def num_beyond(image: Image, pixel_range: Range | None) -> int:
    """Number of pixels that `to_channels` clips: values of a deep image beyond the range."""
    if not is_deep(image):
        return 0
    low, high = pixel_range or DEFAULT_RANGE[image.mode]
    values = np.asarray(image)
    return int(((values < low) | (values > high)).sum())


def to_channels(image: Image, channels: int, pixel_range: Range | None = None) -> Image:
    """`image` as 8-bit RGB (3 channels) or grayscale (1).

    PIL clips deeper pixels at 255. Here 16-bit images are scaled by 65535, float and 32-bit images by their range: the
    same for every image of a dataset, whatever its own maximum is.

    Args:
        image: any PIL image.
        channels: 1 or 3.
        pixel_range: (lowest, highest) value of float and 32-bit images, which become 0 and 255; values beyond are
            clipped. None for 0 to 1 (float) and 0 to 255 (32-bit integers).
    """
    from PIL import Image as Pixels

    if is_deep(image) or image.mode.startswith("I;16"):
        low, high = (pixel_range or DEFAULT_RANGE[image.mode]) if is_deep(image) else (0, _MAX_16_BIT)
        values = (np.asarray(image).astype(np.float64) - low) * (_MAX_8_BIT / ((high - low) or 1))
        image = Pixels.fromarray(values.round().clip(0, _MAX_8_BIT).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def data_url(value: Any, side: int, pixel_range: Range | None = None) -> str | None:
    """A small picture for a page, as a data URL; None if the image cannot be read.

    Args:
        value: see `open_image`.
        side: most pixels per side.
        pixel_range: see `to_channels`.
    """
    try:
        image = to_channels(open_image(value), 3, pixel_range)
    except ValueError:
        return None
    image.thumbnail((side, side))
    kind = "png" if max(image.size) <= _LOSSLESS else "jpeg"
    file = BytesIO()
    image.save(file, format=kind, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


# ---- details ----


def _decoded(content: bytes, draft: bool = False) -> tuple[Image, tuple[int, int]]:
    from PIL import Image as Pixels

    if not content:
        raise ValueError("the file is empty")
    image: Image = Pixels.open(BytesIO(content))
    size = image.size
    if draft:
        image.draft(None, (_DRAFT, _DRAFT))
    image.load()
    return _upright(image), size


def _upright(image: Image) -> Image:
    """`image` rotated by its EXIF orientation, 16-bit values in a 16-bit mode, all values finite."""
    from PIL import Image as Pixels
    from PIL import ImageOps

    form = image.format
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" and form in _FORMATS_OF_16_BITS:
        return Pixels.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("it has NaN or infinite pixels")
    return image


def _from_array(value: Any) -> Image:
    """An image of an array: (height, width) of any type, (height, width, channels) of 8 or 16 bits."""
    from PIL import Image as Pixels

    if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        raise ValueError(f"a {type(value).__name__} is no image")
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.uint16 and array.ndim == 3:  # PIL has no such mode
        array = (array / (_MAX_16_BIT / _MAX_8_BIT)).round().astype(np.uint8)
    elif array.ndim == 2 and array.dtype.kind in "iu" and array.dtype.itemsize > 1 and array.dtype != np.uint16:
        if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
            raise ValueError("its values exceed 32 bits")
        array = array.astype(np.int32)
    elif array.ndim == 2 and array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.ndim == 3 and array.dtype != np.uint8:
        raise ValueError(f"color images are arrays of 8 or 16 bits, and this one is {array.dtype}")
    return Pixels.fromarray(np.ascontiguousarray(array))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn everything PIL raises for unreadable images into `ValueError`."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, struct.error, DecompressionBombError) as error:
        said = _ADDRESS.sub("", one_line(error, 100))
        prefix = "cannot be read as an image"
        raise ValueError(said if said.startswith(prefix) else f"{prefix} ({said})") from error
