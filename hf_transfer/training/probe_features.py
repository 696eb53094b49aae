"""The inputs of a head's linear layer for a whole dataset, computed once per example."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_transfer.data.pairs import LABEL_NAMES
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import Source
from hf_transfer.features.layer_inputs import Watch, layer_inputs
from hf_transfer.features.layouts import token_of
from hf_transfer.features.ranks import Ranks
from hf_transfer.training.running import RunningTrainer


def head_vectors(watch: Watch, batch: Batch, output: Any) -> torch.Tensor:
    """(examples, width): a head's input; of the last token that is not padding, if the head reads all tokens.

    Args:
        watch: of the head's last linear layer, after a forward pass.
        batch: inputs of the model.
        output: of the model.

    Raises:
        UserError: the model's logits are not the layer's output.
    """
    logits = output["logits"] if isinstance(output, dict) else output[0]
    vectors, own = watch.input, watch.output
    if vectors.ndim == 3:
        mask = batch.get("attention_mask")
        vectors, own = token_of(vectors, "last", mask), token_of(own, "last", mask)
    if own.shape != logits.shape or not _agree(own, logits):
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
    source = Source.of(trainer, "features", dataset)
    vectors, labels = _computed(trainer, layer, source, source.collate, _labeled)
    return vectors, labels


def unlabeled_features(trainer: RunningTrainer, layer: nn.Linear, dataset: Any) -> torch.Tensor:
    """(examples, width) of `features`; labels of the dataset are not read.

    Raises:
        WorkFailed: a feature is NaN or infinite.
    """
    source = Source.of(trainer, "features", dataset)
    return _computed(trainer, layer, source, partial(_without_labels, source.collate), _prepared)[0]


def _without_labels(collate: Callable[[list[Any]], Any], examples: list[Any]) -> Any:
    return collate([{n: value for n, value in example.items() if n not in LABEL_NAMES} for example in examples])


def _computed(
    trainer: RunningTrainer,
    layer: nn.Linear,
    source: Source,
    collate: Callable[[list[Any]], Any],
    prepare: Callable[[RunningTrainer, Batch], Batch],
) -> tuple[torch.Tensor, ...]:
    """(vectors, labels if batches have them)."""
    vectors, *labels = layer_inputs(
        trainer.model,
        layer,
        source.dataset,
        collate,
        batch_size=trainer.args.eval_batch_size,
        prepare=partial(prepare, trainer),
        vectors=head_vectors,
        ranks=Ranks(trainer.args.process_index, trainer.args.world_size),
        shows_progress=not trainer.args.disable_tqdm,
        autocast=trainer.accelerator.autocast(),
        num_workers=max(trainer.args.dataloader_num_workers, 0),
        pin_memory=trainer.args.dataloader_pin_memory,
    )
    non_finite = int((~torch.isfinite(vectors).all(-1)).sum())
    if non_finite:
        raise WorkFailed(
            f"The frozen model's features are NaN or infinite for {non_finite:,} examples.",
            "Check those examples, or use a higher precision.",
        )
    return vectors, *labels


def _labeled(trainer: RunningTrainer, batch: Batch) -> Batch:
    """A batch on the trainer's device.

    Raises:
        UserError: it has no labels.
    """
    if "labels" not in batch:
        raise UserError("Solving for a head needs labels, and the examples have none.", "Name the column `labels`.")
    return _prepared(trainer, batch)


def _prepared(trainer: RunningTrainer, batch: Batch) -> Batch:
    return dict(trainer._prepare_inputs(batch))
