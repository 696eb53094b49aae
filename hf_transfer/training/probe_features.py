"""The inputs of a head's linear layer for a whole dataset, computed once per example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.features.examples import Source, batches_by_length, lengths_of
from hf_transfer.training.running import RunningTrainer
from hf_transfer.training.side_effects import without_side_effects


class _Watch:
    """Keeps the last input and output of a layer."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __enter__(self) -> _Watch:
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
            positions = torch.arange(vectors.shape[1], device=vectors.device)
            last = (positions if mask is None else mask * positions).expand(len(vectors), -1).argmax(-1)
            rows = torch.arange(len(vectors), device=vectors.device)
            vectors, output = vectors[rows, last], output[rows, last]
        if output.shape != logits.shape or not torch.allclose(output.float(), logits.float(), rtol=1e-3, atol=1e-4):
            raise UserError(
                "The model's logits are not the output of its head's linear layer: something follows that layer.",
                "Use probe_solver: sgd, and head_init: random.",
            )
        return vectors


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
    vectors, labels = _gathered(trainer, _own_batches(trainer, layer, dataset))
    non_finite = int((~torch.isfinite(vectors).all(-1)).sum())
    if non_finite:
        raise WorkFailed(
            f"The frozen model's features are NaN or infinite for {non_finite:,} examples.",
            "Check those examples, or use a higher precision.",
        )
    return vectors, labels


Batch = tuple[list[int], torch.Tensor, torch.Tensor]  # (numbers of the examples, vectors, labels)


def _own_batches(trainer: RunningTrainer, layer: nn.Linear, dataset: Any) -> list[Batch]:
    """This process's share of the batches."""
    args, model = trainer.args, trainer.model
    source = Source.of(trainer, "features", dataset)
    is_text = isinstance(source.dataset, Dataset) and "input_ids" in source.dataset.column_names
    lengths = lengths_of(source.dataset) if is_text else None
    own = batches_by_length(len(dataset), lengths, args.eval_batch_size)[args.process_index :: args.world_size]
    workers = {"num_workers": max(args.dataloader_num_workers, 0), "pin_memory": args.dataloader_pin_memory}
    loader = torch.utils.data.DataLoader(source.dataset, batch_sampler=own, collate_fn=source.collate, **workers)
    batches: list[Batch] = []
    with without_side_effects(model), torch.no_grad(), _Watch(layer) as watch, trainer.accelerator.autocast():
        model.eval()
        for numbers, batch in zip(own, loader, strict=True):
            inputs = dict(trainer._prepare_inputs(batch))
            if "labels" not in inputs:
                raise UserError(
                    "Solving for a head needs labels, and the examples have none.", "Name the column `labels`."
                )
            labels = inputs.pop("labels")
            output = model(**inputs)
            vectors = watch.vectors(inputs, output["logits"] if isinstance(output, dict) else output[0])
            batches.append((numbers, vectors.float().cpu(), labels.cpu()))
    return batches


def _gathered(trainer: RunningTrainer, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """(vectors, labels) of all processes, in the order of the dataset."""
    if trainer.args.world_size > 1:
        batches = gather_object(batches)
    order = torch.tensor([number for numbers, _, _ in batches for number in numbers]).argsort()
    return torch.cat([x for _, x, _ in batches])[order], torch.cat([y for _, _, y in batches])[order]
