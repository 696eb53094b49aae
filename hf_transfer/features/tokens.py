"""Which positions of a model's hidden states are class tokens, and which are no patches of an image: by experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.features.batches import Batch
from hf_transfer.features.layouts import Layout


@dataclass(frozen=True)
class Rows:
    """The output of a layer group in an autograd graph, and which of its axes is what."""

    value: torch.Tensor
    layout: Layout

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """(examples, positions, width) of the output, or of its gradient."""
        return self.layout.rows(value)


def of_images(model: nn.Module, stem: Rows) -> tuple[tuple[int, ...], bool]:
    """(positions that are no patches, whether the first position is a class token).

    Args:
        model: of the parameters.
        stem: what the first block takes, of images that differ everywhere.
    """
    rows = stem.of(stem.value)
    skipped = tuple((rows == rows[:1]).all(-1).all(0).nonzero()[:, 0].tolist())  # the same for every image
    if 0 not in skipped or not rows.requires_grad:
        return skipped, False
    # A class token is a parameter of one row; register tokens are one parameter of several rows.
    width = stem.layout.width
    single = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad and p.shape[-2:] == (1, width)]
    if not single:
        return skipped, False
    gradients = torch.autograd.grad(rows[:, 0].sum(), single, allow_unused=True, retain_graph=True)
    return skipped, any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def has_class_token(batch: Batch, output: Any, first: Rows, last: Rows) -> bool:
    """Whether the first token of a text stands for the whole.

    That is so where the model's answer depends on no other token of the last layer; or where every text begins with the
    same token, which occurs nowhere else, and which reads the other tokens.

    Args:
        batch: several different texts.
        output: of the model, for any texts.
        first: of the same texts, what the first block takes.
        last: what the last block returns.
    """
    read = read_by_model(output, last)
    if read == "first":
        return True
    if read == "last" or not _same_first_token(batch) or not last.value.requires_grad:
        return False
    seen = _projection([last.of(last.value)[0, 0]])
    (gradient,) = torch.autograd.grad(seen, [first.value], allow_unused=True, retain_graph=True)
    return gradient is not None and bool(first.of(gradient)[0, 1:].any())


def _same_first_token(batch: Batch) -> bool:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        return False
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    texts = {tuple(row[own].tolist()) for row, own in zip(ids, real, strict=True) if own.any()}
    return len(texts) > 1 and len({text[0] for text in texts}) == 1 and all(t[0] not in t[1:] for t in texts)


def read_by_model(output: Any, hidden: Rows) -> str:
    """Which position of the first text, which has no padding, a model's answer depends on.

    Returns:
        `first` or `last`; empty for several positions.
    """
    outputs = pytree.tree_leaves(output["logits"] if isinstance(output, dict) and "logits" in output else output)
    answers = [x for x in outputs if torch.is_tensor(x) and x.requires_grad]
    if not answers or not hidden.value.requires_grad:
        return ""
    (gradient,) = torch.autograd.grad(_projection(answers[:1]), [hidden.value], allow_unused=True, retain_graph=True)
    if gradient is None:
        return ""
    rows = hidden.of(gradient)[0]
    read = rows.any(-1).nonzero()[:, 0].tolist()
    return {(0,): "first", (len(rows) - 1,): "last"}.get(tuple(read), "")


def _projection(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """A weighted sum of all elements, with weights that cancel nothing."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([(x.double() * torch.rand(x.shape, generator=generator).to(x)).sum() for x in values]).sum()
