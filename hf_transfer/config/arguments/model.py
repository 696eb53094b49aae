"""Keys of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting

HEADS = ("linear", "mlp")
HEAD_NORMS = ("none", "batch")
POOLINGS = ("auto", "cls", "mean")


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = setting(
        None, "hub id, local folder, timm/<name>, or bundled:<name>", resume="free"
    )
    model_revision: str = setting("main", "branch, tag or commit on the hub", resume="free")
    from_scratch: bool = setting(
        False, "random weights in the checkpoint's architecture", resume="free", card="changed"
    )
    trust_remote_code: bool = setting(False, "run code from the model's repository (command line only)", resume="free")
    layer_rules: list[Any] | None = setting(
        None, "ordered [pattern, depth] rules for models that declare no layers", resume="plan"
    )
    restart_adapter: bool = setting(
        False,
        "if the checkpoint has an adapter, take its backbone and head only (default: continue training the adapter)",
        resume="free",
    )
    head: str | None = setting(
        None,
        "kind of head: linear, or mlp, which has a hidden layer and loads through hf_transfer only (default: the "
        "checkpoint's, else linear)",
        choices=HEADS,
        resume="fixed",
        card="changed",
    )
    head_hidden_size: int | None = setting(
        None,
        "head: mlp: units of the hidden layer (default: the checkpoint's, else 512)",
        minimum=1,
        resume="fixed",
        card="changed",
    )
    head_dropout: float | list[Any] | None = setting(
        None,
        "head: mlp: dropout probability, or two: before the hidden and before the last layer (default: the "
        "checkpoint's, else [0.25, 0.5])",
        resume="fixed",
        card="changed",
    )
    head_norm: str | None = setting(
        None,
        "head: mlp: none, or batch: BatchNorm after the hidden layer (default: the checkpoint's, else none)",
        choices=HEAD_NORMS,
        resume="fixed",
        card="changed",
    )
    allow_pickle: bool = setting(False, "also load weights that are not safetensors (command line only)", resume="free")
    pooling: str | None = setting(
        None,
        "what the head of a text encoder reads: cls, the first token of the last layer; mean, over the tokens of "
        "pooling_layer; auto, by cross-validation on few training examples; default: as the model is made",
        choices=POOLINGS,
        resume="fixed",
        card="changed",
    )
    pooling_layer: str | None = setting(
        None,
        "pooling: mean: name of the layer group whose tokens are averaged, last, or auto (by cross-validation); the "
        "layers above it are left out",
        resume="fixed",
        card="changed",
    )
