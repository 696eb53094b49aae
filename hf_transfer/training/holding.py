"""A Trainer that holds its model to what it was; see `keeping` for the penalties, `data.replay` for earlier data.

What is overridden, and why that hook:

- `train`: keys that name data or a model must have been read by now.
- `_get_train_sampler`, `_get_dataloader`: examples of earlier data come between those of the training set, which stays
  the trainer's `train_dataset` for everything that looks at it.
- `log`: the terms of the loss.
"""

from __future__ import annotations

from typing import Any

from hf_transfer.config.arguments.forgetting import ForgettingArguments
from hf_transfer.data.augment import Mixed
from hf_transfer.data.replay import ApartCollator, Replay, ReplaySampler, both
from hf_transfer.objectives.anchored import Anchors
from hf_transfer.training import keeping
from hf_transfer.training.loading import Loading


class Holding(Loading):
    """Penalties and replay; see `TransferMixin`.

    Attributes:
        keeps_head: whether the head came with the model's checkpoint, and is held to it as the backbone is.
        anchors: the weights that the model is held to, once a penalty needs them.
        replay: earlier data that is mixed into the batches, if any; to be set before the plan is resolved.
    """

    keeps_head: bool = False
    anchors: Anchors | None = None
    replay: Replay | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.args, ForgettingArguments):
            keeping.check_complete(self)
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.replay is None:
            return super()._get_train_sampler(train_dataset)
        return ReplaySampler(len(self.train_dataset), len(self.replay.dataset), self.replay.fraction, self._order_seed)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if self.replay is None or not kwargs.get("is_training"):
            return super()._get_dataloader(dataset, *args, **kwargs)
        collate = self.data_collator
        dataset, self.data_collator = self.with_replay(dataset, collate)
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collate

    def with_replay(self, dataset: Any, collate: Any) -> tuple[Any, Any]:
        """(the training examples followed by the earlier ones, what makes batches of both).

        Args:
            dataset: the training examples.
            collate: makes batches of them.
        """
        assert self.replay is not None
        if self.replay.apart:
            unmixed = collate.unmixed if isinstance(collate, Mixed) else collate
            collate = ApartCollator(*map(self._get_collator_with_removed_columns, (collate, unmixed)))
        return both(dataset, self.replay), collate

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs |= keeping.values(self)
        super().log(logs, start_time)
