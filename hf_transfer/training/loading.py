"""How a trainer reads its examples: their order, and the numbers by which the boundary cache finds them.

What is overridden, and why that hook:

- `_get_train_sampler`: balanced classes, or batches of like length.
- `get_train_dataloader`: Trainer asks for no sampler where the dataset has no length.
- `_get_dataloader`: batches carry the numbers of their examples (`boundary_cache`), or examples of a target domain.
- `get_eval_dataloader`, `get_test_dataloader`: a metric is computed over every example.
- `prediction_step`: the frozen part of an evaluation is replayed.
- `floating_point_ops`: a batch whose inputs were not read has nothing to count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_transfer.data.bucketing import LengthSampler, lengths_of
from hf_transfer.data.bucketing_choice import Choice
from hf_transfer.data.pairs import Beside, Pairs, PairsCollator
from hf_transfer.errors import UserError
from hf_transfer.features.examples import SKIPPED, TRAINING, VALIDATION
from hf_transfer.layers.architectures import HEAD
from hf_transfer.objectives.losses import BalancedSampler, labels_of
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.probing import Probing


class Loading(Probing):
    """Loaders and samplers; see `TransferMixin`.

    Attributes:
        target_dataset: examples of the domain that the model is adapted to, as the model takes them.
        labeled_targets: how many of the training examples, the last ones, are labeled examples of that domain.
        targets: the same as batches are made from it; None without domain adaptation.
        aligned: where the features are that are drawn together (`features.places`), if any.
        aligned_layer: the layer group whose features these are; `head` for what the head reads.
        alignment: the map of frozen features with which a head was solved for, if any.
    """

    data_collator: Any
    targets: Beside | None = None
    aligned: Any = None
    aligned_layer: str = HEAD
    alignment: Any = None
    _lengths: tuple[Any, torch.Tensor] | None = None  # (training set, token positions of its examples)

    def __init__(self, *args: Any, target_dataset: Any = None, labeled_targets: int = 0, **kwargs: Any):
        self.target_dataset, self.labeled_targets = target_dataset, labeled_targets
        super().__init__(*args, **kwargs)

    # ---- training ----

    @property
    def bucketing(self) -> Choice:
        """Whether batches are of similar length."""
        choice: Choice = self.choices["length_bucketing"]
        return choice

    def get_train_dataloader(self) -> Any:
        if self.bucketing.on:
            self.length_sampler()  # refuses a stream, for which Trainer asks for no sampler
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if isinstance(self.args, TransferArguments) and self.args.balanced_sampling:
            labels = labels_of(self.train_dataset, "balanced_sampling")
            if labels and not isinstance(labels[0], int):
                raise UserError(
                    "balanced_sampling needs exactly one class per example.", "Use class_weights: auto instead."
                )
            return BalancedSampler(labels, self._order_seed)
        if self.bucketing.on:
            return self.length_sampler()
        return super()._get_train_sampler(train_dataset)

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def length_sampler(self) -> LengthSampler:
        """The order of `length_bucketing`. The lengths of a training set are read once.

        Raises:
            UserError: the training set has no lengths.
        """
        if self._lengths is None or self._lengths[0] is not self.train_dataset:
            lengths = lengths_of(self.train_dataset, self.args.length_column_name, self._main_input)
            self._lengths = self.train_dataset, lengths
        return LengthSampler(
            self._lengths[1],
            self._global_batch,
            self._order_seed,
            self.args.dataloader_drop_last,
            fills_last=self.args.world_size > 1 and self.args.accelerator_config.even_batches,
        )

    @property
    def _main_input(self) -> str:
        return getattr(self.model, "main_input_name", "input_ids")

    @property
    def _global_batch(self) -> int:
        """Examples of a batch over all processes."""
        return self._train_batch_size * (1 if self.args.accelerator_config.split_batches else self.args.world_size)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        wrapped = self._wrapped(dataset, TRAINING if kwargs.get("is_training") else VALIDATION)
        if wrapped is None:
            return super()._get_dataloader(dataset, *args, **kwargs)
        collate, sampler = self.data_collator, kwargs.pop("sampler_fn", None)
        data, self.data_collator = wrapped
        try:
            if sampler is not None:
                kwargs["sampler_fn"] = lambda _: sampler(dataset)
            return super()._get_dataloader(data, *args, **kwargs)
        finally:
            self.data_collator = collate

    def _wrapped(self, dataset: Any, name: str) -> tuple[Any, Any] | None:
        """(dataset, collator) of a loader whose batches say more than the examples; None for the examples alone."""
        if self.targets is not None and name == TRAINING and self.boundary.sources.is_own(dataset, name):
            source = self.boundary.sources[TRAINING]
            sources = len(source.dataset) - self.labeled_targets
            collate = PairsCollator(source.collate, self.targets.labeled)
            return Pairs(source.dataset, self.targets, sources), collate
        wrapped: tuple[Any, Any] | None = self.boundary.wrap(dataset, name)
        return wrapped

    # ---- evaluation ----

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0 if SKIPPED in inputs else super().floating_point_ops(inputs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs, replayed = self.boundary.take(inputs, VALIDATION)
        with self.boundary.replaying(inputs, replayed):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._every_example():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._every_example():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _every_example(self) -> Iterator[None]:
        """With a plan, `dataloader_drop_last` applies to training only."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and self.plan is None
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops
