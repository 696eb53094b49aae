"""Examples that say which they are, so that what a model computed from them is found by number.

A batch of a loader over `Numbered` also carries the numbers of its examples. Once everything that the trainable part
needs of an example is stored, the example is no longer read: no image is decoded, no text is padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow.compute
import torch
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_transfer.data.bucketing import chunks, list_lengths
from hf_transfer.features.batches import Batch, positions_of
from hf_transfer.features.cut import Refused

NUMBERS = "example_numbers"  # key in a batch: which examples it holds
SKIPPED = "example_inputs_skipped"  # key in a batch: the inputs were not read; it holds numbers and stored values only
TRAINING, VALIDATION = "training", "validation"


# ---- loaders ---------------------------------------------------------------------------------------------------------


def is_numbered(dataset: Any) -> bool:
    """Whether examples can be read by number; those of a stream cannot."""
    return has_length(dataset) and not isinstance(dataset, torch.utils.data.IterableDataset)


class StoredInputs:
    """What batches are made of once the examples need not be read any more; shared with the loader's workers.

    Attributes:
        values: {name: (examples, …)} of the inputs that are stored; None before they are known.
    """

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] | None = None
        self._suffices = torch.zeros(1, dtype=torch.bool).share_memory_()  # workers live through all stages

    @property
    def suffices(self) -> bool:
        """Whether batches are made of the stored inputs alone."""
        return self.values is not None and bool(self._suffices)

    @suffices.setter
    def suffices(self, value: bool) -> None:
        self._suffices.fill_(value)


class Numbered(Dataset[tuple[int, Any]]):
    """A dataset of (number, example); the example is None if the stored inputs suffice."""

    def __init__(self, dataset: Any, stored: StoredInputs):
        self.dataset, self.stored = dataset, stored

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int, Any]]:
        if self.stored.suffices:
            return [(number, None) for number in numbers]
        items = (
            self.dataset.__getitems__(list(numbers))
            if hasattr(self.dataset, "__getitems__")
            else [self.dataset[number] for number in numbers]
        )
        return list(zip(numbers, items, strict=True))


class NumberedCollator:
    """A collator that adds the numbers of the examples to a batch."""

    def __init__(self, collate: Callable[[list[Any]], Any], stored: StoredInputs):
        self.collate, self.stored = collate, stored

    def __call__(self, pairs: list[tuple[int, Any]]) -> Batch:
        numbers = [int(number) for number, _ in pairs]
        batch: Batch
        if pairs[0][1] is None:
            assert self.stored.values is not None
            batch = {name: value[numbers] for name, value in self.stored.values.items()} | {SKIPPED: True}
        else:
            batch = dict(self.collate([item for _, item in pairs]))
        batch[NUMBERS] = numbers
        return batch


def content_of(batch: Batch) -> torch.Tensor | None:
    """(examples,): a checksum of the tokens of each text, independent of padding; None without texts."""
    ids = batch.get("input_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        return None
    mask = positions_of(batch)
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    factors = mask.cumsum(1) * 2654435761 % 2147483647
    return ((ids + 1) * factors * mask).sum(1).cpu()


class ViewChance(Protocol):
    """Draws augmented views: `data.augment.Chance`.

    Attributes:
        views: number of views of each example; None for a new one in every epoch.
        fixed: the view to take instead of a drawn one.
    """

    views: int | None
    fixed: int | None

    def view(self, example: int) -> int: ...


@dataclass
class Views:
    """Several augmented views of each example, one of which is drawn per epoch.

    Attributes:
        chance: draws them.
        examples: identifier of each training example, that its views are drawn by.
    """

    chance: ViewChance
    examples: Sequence[int]

    @property
    def count(self) -> int:
        """Views of each example."""
        assert self.chance.views is not None
        return self.chance.views

    def row(self, number: int) -> int:
        """Row in a store of the view that training example `number` has in this epoch."""
        return number * self.count + self.chance.view(self.examples[number])

    @contextlib.contextmanager
    def fixed(self, view: int) -> Iterator[None]:
        """Within the context, every example has this view."""
        self.chance.fixed = view
        try:
            yield
        finally:
            self.chance.fixed = None


@dataclass
class Source:
    """A dataset as batches are made from it.

    Attributes:
        name: TRAINING or VALIDATION.
        given: the trainer's dataset.
        dataset: the one that examples are read from, without columns that the model does not take.
        collate: makes batches.
        views: of each example, if several are stored.
        lengths: token positions of each text, without padding.
        stored: inputs that need not be read any more.
        contents: checksum of each text when it was recorded.
    """

    name: str
    given: Any
    dataset: Any
    collate: Callable[[list[Any]], Any]
    views: Views | None = None
    lengths: list[int] | None = None
    stored: StoredInputs = field(default_factory=StoredInputs)
    contents: torch.Tensor | None = None

    @classmethod
    def of(cls, trainer: Trainer, name: str, dataset: Any, views: Views | None = None) -> Source:
        """A dataset as the trainer's own loaders read it."""
        if isinstance(dataset, datasets.Dataset):
            return cls(name, dataset, trainer._remove_unused_columns(dataset, name), trainer.data_collator, views)
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, name)
        return cls(name, dataset, dataset, collate, views)

    @property
    def num_views(self) -> int:
        """Stored views of each example."""
        return 1 if self.views is None else self.views.count

    @property
    def num_rows(self) -> int:
        """Rows in a store: one per view of each example."""
        return len(self.dataset) * self.num_views

    def has_changed(self, inputs: Batch, numbers: list[int]) -> bool:
        """Whether a text of the batch differs from the one that was recorded under its number."""
        content = None if self.contents is None else content_of(inputs)
        return content is not None and self.contents is not None and bool((content != self.contents[numbers]).any())

    def positions(self, numbers: list[int]) -> int:
        """Token positions of a batch of texts, padding included; the number of images. The batch need not be read."""
        return len(numbers) * (1 if self.lengths is None else max(self.lengths[number] for number in numbers))


# ---- texts -----------------------------------------------------------------------------------------------------------


def lengths_of(dataset: Any) -> list[int]:
    """Token positions of each text, without padding."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        items = (dataset[i] for i in range(len(dataset)))
        return [int(sum(i["attention_mask"])) if "attention_mask" in i else len(i["input_ids"]) for i in items]
    if "attention_mask" not in dataset.column_names:
        return [int(length) for length in list_lengths(dataset, "input_ids")]
    without_padding: list[int] = []
    for chunk in chunks(dataset, "attention_mask"):
        lengths = pyarrow.compute.list_value_length(chunk).to_numpy()
        ends, sums = np.cumsum(lengths), np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy())])
        without_padding += (sums[ends] - sums[ends - lengths]).tolist()
    return without_padding


def batches_by_length(count: int, lengths: Sequence[int] | None, size: int) -> list[list[int]]:
    """All of `count` examples in batches of like length, the longest first; the batches are deterministic."""
    order = list(range(count))
    if lengths is not None:
        order.sort(key=lambda number: -lengths[number])
    return [order[i : i + size] for i in range(0, count, size)]


def unpadded(
    value: torch.Tensor, positions: torch.Tensor | None, numbers: list[int], lengths: list[int] | None
) -> list[torch.Tensor]:
    """For each text (length, …): the rows of its own positions, without padding.

    Args:
        value: (examples, positions, …).
        positions: (examples, positions), False at padding; None without padding.
        numbers: of the examples.
        lengths: by number.

    Raises:
        Refused: a text in the batch has another length than in the dataset.
    """
    assert lengths is not None
    mask = None if positions is None else positions.cpu()
    rows = [one if mask is None else one[mask[i]] for i, one in enumerate(value)]
    if any(len(row) != lengths[number] for row, number in zip(rows, numbers, strict=True)):
        raise Refused("the collator changes the length of texts")
    return rows


def padded(rows: list[torch.Tensor], positions: torch.Tensor | None) -> torch.Tensor:
    """(examples, positions, …) from the rows of each text, zeros at padding: the inverse of `unpadded`."""
    if positions is None:
        return torch.stack(rows)
    batch = rows[0].new_zeros((*positions.shape, *rows[0].shape[1:]))
    starts_left = bool(positions[:, 0].all())
    for place, mask, row in zip(batch, positions, rows, strict=True):
        if starts_left and not mask[len(row) :].any():
            place[: len(row)] = row
        else:
            place[mask] = row
    return batch
