"""Size and padding of a batch, as a model reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

Batch = dict[str, Any]


def length_of(batch: Mapping[str, Any]) -> int:
    """Token positions of the texts in a batch, padding included; 0 for a batch without texts."""
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        if torch.is_tensor(batch.get(name)) and batch[name].dim() >= 2:
            return int(batch[name].shape[1])
    return 0


def count_of(batch: Mapping[str, Any]) -> int:
    """Number of examples in a batch."""
    return next(len(value) for value in batch.values() if torch.is_tensor(value) and value.dim())


def positions_of(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(examples, positions): True where there is text, False at padding; None without an attention mask."""
    mask = batch.get("attention_mask")
    return mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None


def resized(batch: Batch, rows: int, length: int) -> Batch:
    """The batch with `rows` examples and `length` positions; the last example is padded on the batch's padding side.

    Examples and positions are repeated or dropped as needed.
    """
    own_length, new_batch = length_of(batch), {}
    picked = torch.arange(rows) % count_of(batch)
    columns = torch.arange(length) % own_length if own_length else None
    for name, value in batch.items():
        if torch.is_tensor(value) and value.dim():
            value = value[picked.to(value.device)]
            if columns is not None and value.dim() >= 2 and value.shape[1] == own_length:
                value = value[:, columns.to(value.device)]
        new_batch[name] = value
    mask = new_batch.get("attention_mask")
    if columns is not None and torch.is_tensor(mask) and mask.dim() == 2:
        pads_left = bool((batch["attention_mask"][:, 0] == 0).any())
        mask = torch.ones_like(mask)
        mask[-1, slice(0, 2) if pads_left else slice(length - 2, length)] = 0
        new_batch["attention_mask"] = mask
    return new_batch


def equal(one: Any, other: Any) -> bool:
    """Whether two batches, model outputs or lists of tensors are bit for bit the same."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a is b or a == b for a, b in pairs)
