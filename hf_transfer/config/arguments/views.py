"""Keys of prediction: how many views of an example are pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_transfer.config.fields import setting
from hf_transfer.errors import UserError

POOLS = ("mean", "max")


@dataclass(frozen=True)
class Views:
    """How a trained model looks at an example."""

    tta: int = setting(
        1,
        "test-time augmentation: views per image, logits pooled: the whole image, then crops of seven eighths, each "
        "also mirrored if training mirrored",
        resume="free",
    )
    stride: int | None = setting(
        None,
        "split long texts into windows that overlap by this many tokens, and pool their logits (default: truncate)",
        resume="free",
    )
    pool: str = setting("mean", "how the logits of several views are pooled, per label", choices=POOLS, resume="free")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Views:
        """Of the keys of this class among `values`.

        Raises:
            UserError: a value is none.
        """
        made = cls(**{f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None})
        if made.tta < 1:
            raise UserError(f"tta: {made.tta} is not positive.")
        if made.stride is not None and made.stride < 0:
            raise UserError(f"stride: {made.stride} is negative.")
        if made.pool not in POOLS:
            raise UserError(f"pool: {made.pool!r} is not one of {', '.join(POOLS)}.")
        return made

    @property
    def several(self) -> bool:
        """Whether an example may be looked at more than once."""
        return self.tta > 1 or self.stride is not None
