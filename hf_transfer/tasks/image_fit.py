"""Do images fit what a model reads? Their size and their colors, on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from PIL import Image

from hf_transfer.data.facts import Misfit

SAMPLE = 64  # images
ENLARGED = 8.0  # times, above which what an ImageNet model sees is interpolation; CIFAR's 32 px at 224 are 7 times
_COLORED = 0.5  # fraction of the images
_LEAST_CHROMA = 16  # of 255, between the channels of a pixel; compression leaves less in gray pictures
_THUMBNAIL = 32  # pixels a side, in which colors are looked for


def misfits(images: Sequence[tuple[Any, tuple[int, int]]], side: int | None, channels: int) -> list[Misfit]:
    """What of the images a model is not made for; grayscale images for an RGB model are fine.

    Args:
        images: a sample, as `glance` returns them: an image, perhaps decoded at a smaller size, and its true size.
        side: of the square images that the model reads, in pixels; None if it does not say.
        channels: that the model reads, 1 or 3.
    """
    found: list[Misfit] = []
    if not images:
        return found
    longest = median(max(size) for _, size in images)
    if side is not None and (times := side / longest) > ENLARGED:
        found.append(
            Misfit(
                "enlargement",
                times,
                ENLARGED,
                f"the median of sampled images has {longest:,.0f} px a side and is enlarged {times:.0f} times to the "
                f"{side} px that the model reads (above {ENLARGED:g} times it does not fit): edges and textures that "
                "it has learned are not in them. Choose a model for small images, a smaller image_size, or a strategy "
                "that trains all layers.",
            )
        )
    if channels == 1 and (colored := sum(_is_colored(image) for image, _ in images) / len(images)) > _COLORED:
        found.append(
            Misfit(
                "color images",
                colored,
                _COLORED,
                f"{colored:.0%} of sampled images are in color, and the model reads grayscale: colors are dropped. "
                "Choose a model of 3 channels if they matter.",
            )
        )
    return found


def _is_colored(image: Any) -> bool:
    """Whether a tenth of the pixels have a color."""
    if image.mode not in ("RGB", "RGBA", "P", "CMYK", "YCbCr", "LAB", "HSV"):
        return False
    small = image.convert("RGB").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    raw = small.tobytes()
    chroma = [max(raw[i : i + 3]) - min(raw[i : i + 3]) for i in range(0, len(raw), 3)]
    return sum(c >= _LEAST_CHROMA for c in chroma) > len(chroma) / 10
