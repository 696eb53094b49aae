"""The datasets of a trainer whose frozen outputs are recorded, as batches are made from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_transfer.data.pairs import PairsCollator
from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import TRAINING, VALIDATION, Source, Views, is_numbered
from hf_transfer.training.running import RunningTrainer


class Sources:
    """A trainer's datasets, by name.

    Attributes:
        views: of each training example, if several are stored.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.views: Views | None = None
        self._by_name: dict[str, Source] = {}

    def __getitem__(self, name: str) -> Source:
        """The source TRAINING or VALIDATION, renewed if the trainer has another dataset now."""
        dataset = self._dataset(name)
        source = self._by_name.get(name)
        if source is None or source.given is not dataset:
            source = Source.of(self.trainer, name, dataset, self.views if name == TRAINING else None)
            self._by_name[name] = source
        return source

    def __iter__(self) -> Iterator[Source]:
        """Those in use so far."""
        return iter(self._by_name.values())

    def current(self, name: str) -> Source:
        """The source as it was when it was last asked for."""
        return self._by_name[name]

    def _dataset(self, name: str) -> Any:
        return self.trainer.train_dataset if name == TRAINING else self.trainer.eval_dataset

    def is_own(self, dataset: Any, name: str) -> bool:
        """Whether `dataset` is the trainer's dataset of this name."""
        return dataset is self._dataset(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources whose examples are read by number in every epoch."""
        args, data = self.trainer.args, self.trainer.eval_dataset
        evaluates = is_numbered(data) and not isinstance(data, dict) and args.eval_strategy != "no"
        return (TRAINING, VALIDATION) if evaluates and not args.include_for_metrics else (TRAINING,)

    def load(self, source: Source, numbers: Sequence[int], alone: bool = False) -> Batch:
        """A batch of these examples, on the trainer's device.

        Args:
            source: of the examples.
            numbers: which.
            alone: whether training examples come without those of the target domain, as an evaluation takes them.
        """
        examples, collate = [source.dataset[number] for number in numbers], source.collate
        if source.name == TRAINING and not alone and (targets := self.trainer.targets) is not None:
            examples, collate = targets.full(numbers, examples), PairsCollator(collate, targets.labeled)
        batch = collate(examples)
        return dict(self.trainer._prepare_inputs(dict(batch)))
