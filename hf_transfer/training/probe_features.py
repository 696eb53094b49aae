"""The inputs of a head's linear layer for a whole dataset, computed once per example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import Source, batches_by_length
from hf_transfer.features.layouts import token_of
from hf_transfer.features.passes import in_order, run_pass, text_lengths
from hf_transfer.features.ranks import Ranks
from hf_transfer.training.running import RunningTrainer


class Watch:
    """Keeps the last input and output of a layer."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __enter__(self) -> Watch:
        self.handle = self.layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.input, self.output = inputs[0], output

    def vectors(self, batch: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
        """(examples, width): the layer's input; of the last token that is not padding, if the head reads all tokens.

        Raises:
            UserError: the model's logits are not the layer's output.
        """
        vectors, output = self.input, self.output
        if vectors.ndim == 3:
            mask = batch.get("attention_mask")
            vectors, output = token_of(vectors, "last", mask), token_of(output, "last", mask)
        if output.shape != logits.shape or not _agree(output, logits):
            raise UserError(
                "The model's logits are not the output of its head's linear layer: something follows that layer.",
                "Use probe_solver: sgd, head_init: random and contrastive_epochs: 0.",
            )
        return vectors


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same up to rounding; who reads them looks for NaN."""
    return torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-4, equal_nan=True)


def features(trainer: RunningTrainer, layer: nn.Linear, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """((examples, width) inputs of `layer` in fp32, labels) of a dataset, computed on all processes.

    In eval mode, without gradient, in the run's precision; texts of like length share a batch.

    Raises:
        UserError: the dataset has no length or no labels.
        WorkFailed: a feature is NaN or infinite.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise UserError(
            "Solving for a head needs all examples at once, and the dataset has no length.",
            "Use a dataset with a length.",
        )
    vectors, labels = _computed(trainer, layer, dataset)
    non_finite = int((~torch.isfinite(vectors).all(-1)).sum())
    if non_finite:
        raise WorkFailed(
            f"The frozen model's features are NaN or infinite for {non_finite:,} examples.",
            "Check those examples, or use a higher precision.",
        )
    return vectors, labels


def _computed(trainer: RunningTrainer, layer: nn.Linear, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(vectors, labels) of all processes, in the order of the dataset."""
    args, model = trainer.args, trainer.model
    source, ranks = Source.of(trainer, "features", dataset), Ranks(args.process_index, args.world_size)
    batches = batches_by_length(len(dataset), text_lengths(source.dataset), args.eval_batch_size)
    computed: list[tuple[list[int], tuple[torch.Tensor, torch.Tensor]]] = []
    watch = Watch(layer)

    def visit(numbers: list[int], inputs: Batch) -> None:
        if "labels" not in inputs:
            raise UserError("Solving for a head needs labels, and the examples have none.", "Name the column `labels`.")
        labels = inputs.pop("labels")
        with watch:
            output = model(**inputs)
        vectors = watch.vectors(inputs, output["logits"] if isinstance(output, dict) else output[0])
        computed.append((numbers, (vectors.float().cpu(), labels.cpu())))

    run_pass(
        model,
        source.dataset,
        source.collate,
        ranks.share(batches, on_disk=False),
        visit,
        prepare=lambda batch: dict(trainer._prepare_inputs(batch)),
        autocast=trainer.accelerator.autocast(),
        num_workers=max(args.dataloader_num_workers, 0),
        pin_memory=args.dataloader_pin_memory,
        shows_progress=trainer.is_world_process_zero() and not args.disable_tqdm,
    )
    vectors, labels = in_order(ranks, computed)
    return vectors, labels
