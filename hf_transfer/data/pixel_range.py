"""The range of float and 32-bit images: decided once over the training split, the same for every image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_transfer.data.images import Range, encoded, extremes, is_deep, open_image, undecoded
from hf_transfer.errors import UserError

Array = np.ndarray[Any, Any]
_BATCH = 256
_HEAD = 16  # bytes of a file that tell its format
# First bytes of formats that have no float and no 32-bit images: JPEG, PNG, GIF, BMP, WebP.
_NEVER_DEEP = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF")
_CONVENTIONAL = (1.0, 255.0)  # highest values of the usual ranges, which begin at 0
_FILLED = 0.5  # a usual range is taken if the values reach at least this fraction of it


def deep_extremes(split: Dataset, column: str) -> Array:
    """(float and 32-bit images of a split, 2) lowest and highest values; unreadable images are left out.

    Of other images only the first bytes are read.
    """
    inputs = undecoded(split, [column])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = [
            pair
            for batch in inputs.iter(batch_size=_BATCH)
            for pair in pool.map(_extremes_of, batch[column])
            if pair is not None
        ]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def decide_range(measured: Array) -> Range | None:
    """The range of images with these extremes; None if there are none.

    It is 0 to 1 or 0 to 255 if the values lie in it and reach at least half of it, else from the lowest to the highest.
    """
    if not len(measured):
        return None
    low, high = float(measured[:, 0].min()), float(measured[:, 1].max())
    for top in _CONVENTIONAL:
        if low >= 0 and _FILLED * top <= high <= top:
            return 0.0, top
    return (low, high) if low < high else (min(0.0, low), max(0.0, high) or 1.0)


def num_clipped(measured: Array, pixel_range: Range) -> int:
    """Number of images with values beyond the range."""
    return int(((measured[:, 0] < pixel_range[0]) | (measured[:, 1] > pixel_range[1])).sum())


def checked_range(given: Sequence[float] | None) -> Range | None:
    """The value of the key `pixel_range`.

    Raises:
        UserError: it is not two ascending finite numbers.
    """
    if given is None:
        return None
    numbers = [float(v) for v in given if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(given) != 2 or len(numbers) != 2 or not (np.isfinite(numbers).all() and numbers[0] < numbers[1]):
        raise UserError(
            f"expected two numbers, the lowest and the highest value, got {list(given)}.",
            "For example [0, 4095].",
            key="pixel_range",
        )
    return numbers[0], numbers[1]


def _extremes_of(cell: Any) -> Range | None:
    from PIL import Image as Pixels

    try:
        if _head(cell).startswith(_NEVER_DEEP):
            return None
        content = encoded(cell)
        with Pixels.open(BytesIO(content)) as image:
            if not is_deep(image):  # of its header
                return None
        opened = open_image(content)
        return extremes(opened) if is_deep(opened) else None
    except (ValueError, OSError, SyntaxError):  # named by the examination, or by the first batch
        return None


def _head(cell: Any) -> bytes:
    """The first bytes of an image file."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str | Path):
        with Path(cell).open("rb") as file:
            return file.read(_HEAD)
    return encoded(cell)[:_HEAD]
