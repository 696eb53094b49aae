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

    Examples and positions are repeated or dropped as needed. The first and the last token of a text stay first and
    last: a class token, and the one end token that BART and its kin classify.
    """
    own_length, new_batch = length_of(batch), {}
    picked = torch.arange(rows) % count_of(batch)
    mask = positions_of(batch)
    columns, pads_left = None, mask is not None and bool((~mask[:, 0]).any())
    if own_length:
        columns = torch.stack([_columns(None if mask is None else mask[i], own_length, length) for i in picked])
        if mask is not None:
            short = _columns(mask[picked[-1]], own_length, length - 2)
            first_pad = (~mask).nonzero()[:1]
            pad = short[:1] if not len(first_pad) else first_pad[0, 1:].cpu()
            columns[-1] = torch.cat([pad, pad, short] if pads_left else [short, pad, pad])
    sources = picked[:, None].expand(rows, length).clone()
    if mask is not None and not bool(mask.all()):  # the padding of the last example is the one of any padded example
        sources[-1, slice(0, 2) if pads_left else slice(length - 2, length)] = (~mask).nonzero()[0, 0].cpu()
    for name, value in batch.items():
        if torch.is_tensor(value) and value.dim():
            if columns is not None and value.dim() >= 2 and value.shape[1] == own_length:
                value = value[sources.to(value.device), columns.to(value.device)]
            else:
                value = value[picked.to(value.device)]
        new_batch[name] = value
    if mask is not None:
        new_mask = torch.ones(rows, length, dtype=batch["attention_mask"].dtype, device=mask.device)
        new_mask[-1, slice(0, 2) if pads_left else slice(length - 2, length)] = 0
        new_batch["attention_mask"] = new_mask
    return new_batch


def _columns(mask: torch.Tensor | None, own_length: int, length: int) -> torch.Tensor:
    """(length,): the positions that a text of `length` tokens is made of, given the mask of its `own_length` ones."""
    places = torch.arange(own_length) if mask is None or not bool(mask.any()) else mask.nonzero()[:, 0].cpu()
    inner = max(len(places) - 2, 1)
    order = 1 + torch.arange(length - 1) % inner if len(places) > 2 else torch.arange(1, length)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), order[: length - 2], torch.tensor([len(places) - 1])])
    return places[order % len(places)]


def equal(one: Any, other: Any) -> bool:
    """Whether two batches, model outputs or lists of tensors are bit for bit the same."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a is b or a == b for a, b in pairs)
