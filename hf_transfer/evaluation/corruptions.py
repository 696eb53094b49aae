"""Common corruptions of images and typos in texts, to measure how much of a metric is left under them.

The images' are six of the corruptions of Hendrycks and Dietterich 2019 (section 4.1), with the strengths of their
severities 1, 3 and 5. Blur and noise of theirs are for images of 224 pixels: here the blur grows with the image, so
that it looks alike in all sizes. Typos are those that a keyboard makes (Belinkov and Bisk 2018, section 3): letters
that change places, that are missing, or that are the key next to the right one (QWERTY).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer.evaluation.scores import Array

if TYPE_CHECKING:
    from PIL.Image import Image

# A function of (input, strength, source of chance), with its three strengths, the weakest first.
Corruption = tuple[Callable[[Any, float, np.random.Generator], Any], tuple[float, float, float]]
SEVERITIES = (1, 2, 3)
_USUAL_SIDE = 224  # pixels, of the images that the strengths were chosen for
_TYPICAL = 255.0


def chance_of(seed: int, name: str, severity: int, number: int, column: int = 0) -> np.random.Generator:
    """The source of chance for one example, whatever the batch and the order it comes in.

    Args:
        seed: of the evaluation.
        name: of the corruption.
        severity: of it.
        number: of the example.
        column: of the input, in a pair of texts.
    """
    return np.random.default_rng([seed, *name.encode(), severity, number, column])


# ---- images --------------------------------------------------------------------------------------------------------


def _noise(image: Image, strength: float, chance: np.random.Generator) -> Image:
    pixels = np.asarray(image, dtype=np.float32)
    return _image(pixels + chance.normal(0.0, strength * _TYPICAL, pixels.shape))


def _blur(image: Image, strength: float, chance: np.random.Generator) -> Image:
    from PIL.ImageFilter import GaussianBlur

    return image.filter(GaussianBlur(strength * min(image.size) / _USUAL_SIDE))


def _brightness(image: Image, strength: float, chance: np.random.Generator) -> Image:
    """Adds to the value, the largest of the three channels, and keeps hue and saturation."""
    pixels = np.asarray(image, dtype=np.float32)
    value = pixels if pixels.ndim == 2 else pixels.max(-1, keepdims=True)
    brighter = np.minimum(value + strength * _TYPICAL, _TYPICAL)
    scale = np.divide(brighter, value, out=np.zeros_like(value), where=value > 0)
    return _image(np.where(value > 0, pixels * scale, brighter))


def _contrast(image: Image, strength: float, chance: np.random.Generator) -> Image:
    """Draws every channel towards its mean; `strength` is what is left of the distance."""
    pixels = np.asarray(image, dtype=np.float32)
    mean = pixels.mean((0, 1), keepdims=True)
    return _image((pixels - mean) * strength + mean)


def _jpeg(image: Image, strength: float, chance: np.random.Generator) -> Image:
    from PIL import Image as Pixels

    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(strength))
    return Pixels.open(file).convert(image.mode)


def _pixelate(image: Image, strength: float, chance: np.random.Generator) -> Image:
    from PIL.Image import Resampling

    small = (max(1, int(image.width * strength)), max(1, int(image.height * strength)))
    return image.resize(small, Resampling.BOX).resize(image.size, Resampling.BOX)


def _image(pixels: Array) -> Image:
    from PIL import Image as Pixels

    return Pixels.fromarray(pixels.round().clip(0, _TYPICAL).astype(np.uint8))


# Of 8-bit images, RGB or grayscale.
IMAGES: Mapping[str, Corruption] = {
    "gaussian_noise": (_noise, (0.08, 0.18, 0.38)),
    "blur": (_blur, (1.0, 3.0, 6.0)),
    "brightness": (_brightness, (0.1, 0.3, 0.5)),
    "contrast": (_contrast, (0.4, 0.2, 0.05)),
    "jpeg": (_jpeg, (25, 15, 7)),
    "pixelate": (_pixelate, (0.6, 0.4, 0.25)),
}

# ---- texts ---------------------------------------------------------------------------------------------------------

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbors() -> dict[str, str]:
    """The keys next to a letter: in its row, and those that touch it in the rows above and below."""
    found: dict[str, str] = {}
    for i, row in enumerate(_KEYS):
        for j, key in enumerate(row):
            places = ((i, j - 1), (i, j + 1), (i - 1, j), (i - 1, j + 1), (i + 1, j - 1), (i + 1, j))
            near = [_KEYS[a][b] for a, b in places if 0 <= a < len(_KEYS) and 0 <= b < len(_KEYS[a])]
            found[key] = "".join(near)
    return found


_NEAR = _neighbors()


def _swap(text: str, rate: float, chance: np.random.Generator) -> str:
    """Letters change places with the next one in their word."""
    letters, drawn, i = list(text), chance.random(len(text)) < rate, 0
    while i + 1 < len(letters):
        if drawn[i] and letters[i].isalpha() and letters[i + 1].isalpha():
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
            i += 1
        i += 1
    return "".join(letters)


def _drop(text: str, rate: float, chance: np.random.Generator) -> str:
    """Letters are missing; a text whose every letter would be is left as it is."""
    drawn = chance.random(len(text)) < rate
    kept = "".join(c for c, hit in zip(text, drawn, strict=True) if not (hit and c.isalpha()))
    return kept if kept.strip() else text


def _neighbor(text: str, rate: float, chance: np.random.Generator) -> str:
    """Letters from a to z become the key next to theirs."""
    drawn, which = chance.random(len(text)) < rate, chance.random(len(text))
    letters = list(text)
    for i in np.flatnonzero(drawn):
        if near := _NEAR.get(letters[i].lower()):
            key = near[int(which[i] * len(near))]
            letters[i] = key.upper() if letters[i].isupper() else key
    return "".join(letters)


_RATES = (0.02, 0.05, 0.1)  # of the letters
TEXTS: Mapping[str, Corruption] = {"swap": (_swap, _RATES), "drop": (_drop, _RATES), "neighbor": (_neighbor, _RATES)}
