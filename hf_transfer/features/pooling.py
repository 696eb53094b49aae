"""Pooled outputs of layer groups for a batch, and whether they depend on the padding of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_transfer.features.batches import Batch, positions_of
from hf_transfer.features.cut import CallKey
from hf_transfer.features.inputs import Reader
from hf_transfer.features.places import Places
from hf_transfer.features.replay import observe

Cell = tuple[str, str]  # (group, pooling)
_TOLERANCE, _ROUNDED = 1e-4, 0.05  # relative to a vector's largest value; where products are rounded


def pooled_outputs(model: nn.Module, places: Places, cells: Sequence[Cell], batch: Batch) -> dict[Cell, torch.Tensor]:
    """{(group, pooling): (examples, width) in fp32} of a batch, in one forward pass that ends with the last group.

    Args:
        model: in eval mode.
        places: of the outputs.
        cells: what is wanted.
        batch: on the model's device.
    """
    groups: dict[tuple[CallKey, bool], list[str]] = {}
    for group in dict.fromkeys(group for group, _ in cells):
        key, is_input, _ = places.by_group[group].spot
        groups.setdefault((key, is_input), []).append(group)
    mask, found = positions_of(batch), dict[Cell, torch.Tensor]()

    def see(place: tuple[CallKey, bool], leaves: list[Any]) -> None:
        for group in groups[place]:
            of_group = places.by_group[group]
            poolings = [pooling for name, pooling in cells if name == group]
            pooled = of_group.layout.pooled(leaves[of_group.spot[2]].detach(), poolings, mask)
            found.update({(group, pooling): vectors.float() for pooling, vectors in pooled.items()})

    observe(model, list(groups), batch, see)
    return found


def depending_on_padding(
    model: nn.Module, places: Places, cells: Sequence[Cell], reader: Reader, lengths: Sequence[int]
) -> dict[str, str]:
    """{group: reason, as part of a sentence} where a text has other features next to a longer one than alone."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    short, long = next((n for n in order if lengths[n]), order[0]), order[-1]
    if lengths[short] == lengths[long]:
        return {}
    alone = pooled_outputs(model, places, cells, reader.batch([short]))
    padded = pooled_outputs(model, places, cells, reader.batch([short, long]))
    rounds = torch.is_autocast_enabled(reader.device.type) or next(model.parameters()).dtype.itemsize < 4
    rounds |= torch.get_float32_matmul_precision() != "highest"
    refused = {}
    for cell, vectors in alone.items():
        scale = max(float(vectors.abs().max()), torch.finfo(torch.float32).tiny)
        error = float((padded[cell][0] - vectors[0]).abs().max()) / scale
        if not error <= (_ROUNDED if rounds else _TOLERANCE):
            refused[cell[0]] = (
                f"its features of a text depend on the padding of the batch (by {error:.1e} of the largest); let the "
                "collator pad on the right and return an attention_mask, or use batch_size 1"
            )
    return refused
