"""Keys of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting
from hf_transfer.config.places import split_revision
from hf_transfer.errors import UserError

HEADS = ("linear", "mlp")
HEAD_NORMS = ("none", "batch")
POOLINGS = ("auto", "cls", "mean", "max")
MAIN = "main"  # the revision that a hub gives where none is asked for


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = setting(
        None,
        "hub id (id@revision for a branch, tag or commit), local folder, timm/<name>, or bundled:<name>",
        resume="free",
    )
    model_revision: str = setting(MAIN, "branch, tag or commit on the hub", resume="free")
    from_scratch: bool = setting(
        False, "random weights in the checkpoint's architecture", resume="fixed", card="changed"
    )
    trust_remote_code: bool = setting(False, "run code from the model's repository (command line only)", resume="free")
    layer_rules: list[Any] | None = setting(
        None, "ordered [pattern, depth] rules for models that declare no layers", resume="plan"
    )
    restart_adapter: bool = setting(
        False,
        "if the checkpoint has an adapter, take its head and backbone, with what it trained of that, and start a new "
        "adapter (default: continue training the adapter)",
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
        "what the head reads: cls, the class token; mean or max, over the tokens, patches or pixels of pooling_layer; "
        "auto, cls or mean by cross-validation on few training examples; default: as the model is made",
        choices=POOLINGS,
        resume="fixed",
        card="changed",
    )
    pooling_layer: str | None = setting(
        None,
        "pooling: mean or max: name of the layer group that is pooled, last, or auto (by cross-validation); the layers "
        "above it are left out; average: of the upper half of the layers, the average of one head on each (only this "
        "package loads it)",
        resume="fixed",
        card="changed",
    )

    def __post_init__(self) -> None:
        """Take the revision out of `owner/name@revision`.

        Raises:
            UserError: `model_revision` names another one.
        """
        name, revision = split_revision(self.model_name_or_path or "")
        if revision is None:
            return
        if self.model_revision not in (MAIN, revision):
            raise UserError(
                f"{self.model_revision!r} contradicts {self.model_name_or_path!r}.",
                "Keep one of them.",
                key="model_revision",
            )
        self.model_name_or_path, self.model_revision = name, revision


def check_head(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys of the head, one sentence each."""
    if values["head"] != "mlp":
        head = "without head: mlp" if values["head"] is None else f"with head: {values['head']}"
        return [
            f"{name} has no effect {head}; add head: mlp, or leave it out."
            for name in ("head_hidden_size", "head_dropout", "head_norm")
            if values[name] is not None
        ]
    try:
        head_dropouts(values["head_dropout"])
    except UserError as error:
        return [str(error)]
    return []


def head_dropouts(given: Any) -> tuple[float, float] | None:
    """One value for both places, or two.

    Raises:
        UserError: it is neither.
    """
    if given is None:
        return None
    both = list(given) if isinstance(given, list | tuple) else [given, given]
    are_numbers = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p < 1 for p in both)
    if len(both) == 1 and isinstance(given, list | tuple):
        both = both * 2
    if len(both) != 2 or not are_numbers:
        raise UserError(
            "expected one probability, or two (before the hidden and before the last layer), each at least 0 and below "
            f"1, got {given}.",
            key="head_dropout",
        )
    return float(both[0]), float(both[1])
