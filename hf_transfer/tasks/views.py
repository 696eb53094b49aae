"""Several views of an example with pooled logits: test-time augmentation of images, windows of long texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def pooled(rows: Any, owners: Sequence[int], pool: str) -> Any:
    """Pool the logits of each example's views.

    Args:
        rows: (views, classes) logits, those of an example next to each other.
        owners: (views,) index of the example that each row belongs to.
        pool: `mean` or `max`.

    Returns:
        (examples, classes) logits.
    """
    import numpy as np

    starts = np.flatnonzero(np.diff(np.asarray(owners), prepend=-1))
    if len(starts) == len(rows):
        return rows
    if pool == "max":
        return np.maximum.reduceat(rows, starts)
    counts = np.diff(starts, append=len(rows))
    return np.add.reduceat(rows, starts) / counts[:, None].astype(rows.dtype)


# ---- images --------------------------------------------------------------------------------------------------------

_CROP = 7 / 8
# Position of a crop: fractions of the remaining width and height that are to its left and above it.
_POSITIONS = ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))


def most_looks(mirrored: bool) -> int:
    """The maximum number of views of an image."""
    return (1 + len(_POSITIONS)) * (2 if mirrored else 1)


def looks(image: Any, number: int, mirrored: bool) -> Iterator[Any]:
    """The first `number` views of a PIL image: the whole image, then the center crop and the corner crops."""
    from PIL import ImageOps

    width, height = (max(1, round(side * _CROP)) for side in image.size)
    boxes = [(0, 0, *image.size)]
    for left, above in _POSITIONS:
        x, y = round((image.size[0] - width) * left), round((image.size[1] - height) * above)
        boxes.append((x, y, x + width, y + height))
    count = 0
    for i, box in enumerate(boxes):
        part = image if i == 0 else image.crop(box)
        for view in (part, ImageOps.mirror(part)) if mirrored else (part,):
            if count < number:
                count += 1
                yield view
