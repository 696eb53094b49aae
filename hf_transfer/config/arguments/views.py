"""Keys of prediction: how many views of an example are pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_transfer.config.fields import key
from hf_transfer.errors import UserError

POOLS = ("mean", "max")


@dataclass(frozen=True)
class Views:
    """How a trained model looks at an example."""

    tta: int = key(
        1,
        "looks at an image whose logits are pooled (test-time augmentation): the whole, then crops of seven eighths, "
        "each also mirrored where training mirrored",
    )
    stride: int | None = key(
        None,
        "read long texts in windows that share so many tokens, and pool their logits (default: long texts are cut)",
    )
    pool: str = key("mean", "how logits of several looks are pooled, for each label", choices=POOLS)

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
