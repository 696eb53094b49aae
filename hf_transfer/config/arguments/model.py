"""Keys of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import key


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = key(None, "hub id, local folder, timm/<name>, or bundled:<name>")
    model_revision: str = key("main", "branch, tag or commit on the hub")
    from_scratch: bool = key(False, "random weights in the checkpoint's architecture")
    trust_remote_code: bool = key(False, "run code from the model's repository (command line only)")
    layer_rules: list[Any] | None = key(None, "ordered [pattern, depth] rules for models without declared layers")
    restart_adapter: bool = key(
        False, "of a checkpoint with an adapter, take the backbone and the head only (default: go on with the adapter)"
    )
    allow_pickle: bool = key(False, "also load weights that are not safetensors (command line only)")
