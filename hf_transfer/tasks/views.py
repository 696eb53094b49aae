"""Several looks at an example, whose logits are pooled: changed images, windows of a long text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def pooled(rows: Any, owners: Sequence[int], pool: str) -> Any:
    """(rows, width) → (examples, width): the rows of each example as one."""
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
# Where the room that a crop leaves lies: shares of it to the left and above.
_PLACES = ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))


def most_looks(mirrored: bool) -> int:
    """How many looks at an image there are."""
    return (1 + len(_PLACES)) * (2 if mirrored else 1)


def looks(image: Any, number: int, mirrored: bool) -> Iterator[Any]:
    """The first `number` looks at a PIL image, always the same: the whole, then its middle and its corners."""
    from PIL import ImageOps

    width, height = (max(1, round(side * _CROP)) for side in image.size)
    boxes = [(0, 0, *image.size)]
    for left, above in _PLACES:
        x, y = round((image.size[0] - width) * left), round((image.size[1] - height) * above)
        boxes.append((x, y, x + width, y + height))
    made = 0
    for i, box in enumerate(boxes):
        part = image if i == 0 else image.crop(box)
        for look in (part, ImageOps.mirror(part)) if mirrored else (part,):
            if made < number:
                made += 1
                yield look
