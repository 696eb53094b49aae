"""The keys `head`, `head_hidden_size`, `head_dropout` and `head_norm`, and what they make of a checkpoint's head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hf_transfer.config.arguments.model import ModelArguments, head_dropouts
from hf_transfer.errors import UserError
from hf_transfer.models.heads import HEAD_KEY, LINEAR, MLP, MLPSpec, blank, last_linear
from hf_transfer.models.pooled_head import PoolingSpec


@dataclass(frozen=True)
class HeadChange:
    """What the keys make of a checkpoint's head.

    Attributes:
        path: of the layer to replace, once the checkpoint is loaded; empty if its head stays.
        spec: the MLP to replace it by; None for a linear layer.
        notes: messages for the user.
    """

    path: str = ""
    spec: MLPSpec | None = None
    notes: tuple[str, ...] = ()


def settle(args: ModelArguments, auto_class: Any, config: PreTrainedConfig) -> HeadChange:
    """Decide on the head that a model gets.

    Without the key `head` the checkpoint's kind of head stays. `head: mlp` keeps an MLP of the sizes that are given;
    another dropout is written into `config`.

    Raises:
        UserError: the model's head does not end with one linear layer.
    """
    own = MLPSpec.of(config)
    if args.head == LINEAR and own is not None:
        return HeadChange(own.path, None, (f"head: linear replaces the checkpoint's head, an {own}.",))
    if args.head != MLP:
        return HeadChange()
    if PoolingSpec.of(config) is not None:
        raise UserError(
            "mlp cannot replace the checkpoint's head, which reads a pooled layer.",
            "Leave head out, or begin with another checkpoint.",
            key="head",
        )
    *below, path = last_linear(blank(auto_class, config, args.trust_remote_code), args.layer_rules)
    start = own or MLPSpec(path)
    wanted = MLPSpec(
        path,
        args.head_hidden_size or start.hidden_size,
        head_dropouts(args.head_dropout) or start.dropout,
        args.head_norm or start.norm,
    )
    if own is not None and wanted.fits(own):
        setattr(config, HEAD_KEY, wanted.to_dict())
        return HeadChange(notes=(f"head: mlp: the checkpoint's {own}, is kept.",) if wanted == own else ())
    replaced = f"the checkpoint's {own}" if own is not None else f"the linear layer {path}"
    kept = f" The layers of the head below it ({', '.join(below)}) are kept." if below else ""
    return HeadChange(path, wanted, (f"head: mlp: an {wanted}, replaces {replaced}.{kept}",))
