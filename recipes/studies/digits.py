"""Two domains from scikit-learn's digits: as they are, and in front of colored grounds.

Written as image folders: `out/studies/digits/plain/<digit>/*.png` (the source), `colored/*.png` (the target, without
labels) and `colored_labeled/<digit>/*.png` (other digits of the target's kind, to measure with).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

COUNTS = {"plain": 200, "colored": 200, "colored_labeled": 200}
SIZE = 32
STRENGTH = 0.5  # of the ground, next to the digit


def plain(digit: np.ndarray) -> Image.Image:
    """A digit of 8 × 8 as a picture."""
    return (
        Image.fromarray((digit * 255 / 16).astype(np.uint8))
        .resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        .convert("RGB")
    )


def colored(digit: np.ndarray, draw: np.random.Generator) -> Image.Image:
    """The absolute difference with a blurred random pattern."""
    ground = Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(2))
    spread = np.asarray(ground, float) - 128
    spread *= 255 * STRENGTH / max(1.0, float(np.ptp(spread)))
    mixed = np.abs(np.asarray(plain(digit), float) - (spread + 255 * STRENGTH / 2))
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def main() -> None:
    draw, out = np.random.default_rng(0), Path("out/studies/digits")
    digits = load_digits()
    order = iter(draw.permutation(len(digits.images)))
    for kind, count in COUNTS.items():
        for i in range(count):
            number = next(order)
            image, label = digits.images[number], str(digits.target[number])
            folder = out / kind if kind == "colored" else out / kind / label
            folder.mkdir(parents=True, exist_ok=True)
            (plain(image) if kind == "plain" else colored(image, draw)).save(folder / f"{i:03}.png")


if __name__ == "__main__":
    main()
