"""What a layer of a frozen model reads, for every example of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import batches_by_length
from hf_transfer.features.inputs import Reader
from hf_transfer.features.passes import in_order, run_pass, text_lengths
from hf_transfer.features.ranks import Ranks


def layer_inputs(
    model: nn.Module, layer: nn.Module, dataset: Any, collate: Callable[[list[Any]], Any], batch_size: int = 32
) -> torch.Tensor:
    """(examples, width) in fp32, in the dataset's order: the input of a layer that reads one vector per example.

    Args:
        model: on the device to compute on; afterwards as before, bit for bit.
        layer: of the model, called once per forward pass.
        dataset: map-style; columns that the model does not take are left out.
        collate: makes a batch from a list of examples.
        batch_size: examples per batch and rank.

    Raises:
        UserError: the dataset is a stream, is empty or lacks the model's inputs.
    """
    reader, ranks = Reader.of(model, dataset, collate), Ranks.current()
    computed: list[tuple[list[int], tuple[torch.Tensor]]] = []

    def visit(numbers: list[int], batch: Batch) -> None:
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            model(**{name: value for name, value in batch.items() if name != "labels"})
        finally:
            handle.remove()
        computed.append((numbers, (seen[-1].float().cpu(),)))

    batches = batches_by_length(len(reader.dataset), text_lengths(reader.dataset), batch_size)
    run_pass(
        model,
        reader.dataset,
        reader.collate,
        ranks.share(batches, on_disk=False),
        visit,
        prepare=reader.prepared,
        shows_progress=ranks.rank == 0,
    )
    return in_order(ranks, computed)[0]
