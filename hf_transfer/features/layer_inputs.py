"""What a layer of a frozen model reads, for every example of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import batches_by_length
from hf_transfer.features.passes import in_order, run_pass, text_lengths
from hf_transfer.features.ranks import Ranks


class Watch:
    """Keeps the last input and output of a layer.

    Attributes:
        input: of its last call within the context.
        output: likewise.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __enter__(self) -> Watch:
        self.handle = self.layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.input, self.output = inputs[0], output


def input_of(watch: Watch, batch: Batch, output: Any) -> torch.Tensor:
    """The input of a layer that reads one vector per example."""
    vectors: torch.Tensor = watch.input
    return vectors


def layer_inputs(
    model: nn.Module,
    layer: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    prepare: Callable[[Batch], Batch],
    vectors: Callable[[Watch, Batch, Any], torch.Tensor] = input_of,
    ranks: Ranks | None = None,
    shows_progress: bool = True,
    **loading: Any,
) -> tuple[torch.Tensor, ...]:
    """((examples, width) in fp32, labels if batches have them), in the dataset's order; all processes must call it.

    Args:
        model: on the device to compute on; afterwards as before, bit for bit.
        layer: of the model, called once per forward pass.
        dataset: map-style.
        collate: makes a batch from a list of examples.
        batch_size: examples per batch and rank.
        prepare: as in `features.passes.run_pass`, like `shows_progress` and `loading`.
        vectors: what is kept of a batch, one row per example; called with the layer's input and output, the model's
            inputs and its output.
        ranks: that share the pass; by default those of `torch.distributed`.
        shows_progress: on the first rank.
        **loading: `autocast`, `num_workers` and `pin_memory`.
    """
    ranks, watch = Ranks.current() if ranks is None else ranks, Watch(layer)
    computed: list[tuple[list[int], tuple[torch.Tensor, ...]]] = []

    def visit(numbers: list[int], batch: Batch) -> None:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = (batch["labels"].cpu(),) if "labels" in batch else ()
        with watch:
            output = model(**inputs)
        computed.append((numbers, (vectors(watch, inputs, output).float().cpu(), *labels)))

    batches = batches_by_length(len(dataset), text_lengths(dataset), batch_size)
    shows = shows_progress and ranks.rank == 0
    shared = ranks.share(batches, on_disk=False)
    run_pass(model, dataset, collate, shared, visit, prepare=prepare, shows_progress=shows, **loading)
    return in_order(ranks, computed)
