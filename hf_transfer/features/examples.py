"""Examples that say which they are: where what a model computed of them is stored, it is found again by their number.

A batch of a loader over `Numbered` also carries the numbers of its examples. Once nothing of an example is needed that
is not stored, it is not read any more: no picture is decoded, no text padded.
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
from hf_transfer.features.replay import Batch, Refused, positions_of

NUMBERS = "example_numbers"  # in a batch: which examples it holds
SKIPPED = "example_inputs_skipped"  # in a batch: there are only the numbers, and what is kept beside
TRAINING, VALIDATION = "training", "validation"


# ---- loaders ----


def is_numbered(dataset: Any) -> bool:
    """Whether examples can be asked for by number: those of a stream cannot."""
    return has_length(dataset) and not isinstance(dataset, torch.utils.data.IterableDataset)


class Rows:
    """What batches are made of once pictures need not be read any more.

    Attributes:
        kept: {name: (examples, …)} of what a batch holds beside them; None before it is known.
    """

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] | None = None
        self._ready = torch.zeros(1, dtype=torch.bool).share_memory_()  # workers live through all stages

    @property
    def ready(self) -> bool:
        return self.kept is not None and bool(self._ready)

    @ready.setter
    def ready(self, value: bool) -> None:
        self._ready.fill_(value)


class Numbered(Dataset[tuple[int, Any]]):
    """A data set whose items say their number, and are None where they need not be read."""

    def __init__(self, dataset: Any, rows: Rows):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int, Any]]:
        if self.rows.ready:
            return [(number, None) for number in numbers]
        items = (
            self.dataset.__getitems__(list(numbers))
            if hasattr(self.dataset, "__getitems__")
            else [self.dataset[number] for number in numbers]
        )
        return list(zip(numbers, items, strict=True))


class NumberedCollator:
    """A collator that tells which examples a batch holds."""

    def __init__(self, collate: Callable[[list[Any]], Any], rows: Rows):
        self.collate, self.rows = collate, rows

    def __call__(self, pairs: list[tuple[int, Any]]) -> Batch:
        numbers = [int(number) for number, _ in pairs]
        batch: Batch
        if pairs[0][1] is None:
            assert self.rows.kept is not None
            batch = {name: value[numbers] for name, value in self.rows.kept.items()} | {SKIPPED: True}
        else:
            batch = dict(self.collate([item for _, item in pairs]))
        batch[NUMBERS] = numbers
        return batch


def content_of(batch: Batch) -> torch.Tensor | None:
    """(examples,): a number for the tokens of each text, whatever its padding; None where there are none."""
    ids = batch.get("input_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        return None
    mask = positions_of(batch)
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    places = mask.cumsum(1) * 2654435761 % 2147483647
    return ((ids + 1) * places * mask).sum(1).cpu()


class Drawn(Protocol):
    """The source of views: `data.augment.Chance`."""

    views: int | None
    fixed: int | None

    def view(self, example: int) -> int: ...


@dataclass
class Views:
    """Several views of each example, one of which is drawn for an epoch.

    Attributes:
        chance: draws them.
        examples: what each training example is known by.
    """

    chance: Drawn
    examples: Sequence[int]

    @property
    def count(self) -> int:
        assert self.chance.views is not None
        return self.chance.views

    def row(self, number: int) -> int:
        """Where that view of training example `number` is kept whose turn it is."""
        return number * self.count + self.chance.view(self.examples[number])

    @contextlib.contextmanager
    def fixed(self, view: int) -> Iterator[None]:
        """In here every example is seen in this view."""
        self.chance.fixed = view
        try:
            yield
        finally:
            self.chance.fixed = None


@dataclass
class Source:
    """Examples as batches are made of them.

    Attributes:
        name: TRAINING or VALIDATION.
        given: the trainer's data set.
        dataset, collate: what batches are made of, and by.
        views: of each example, where several are stored.
        lengths: positions of each text.
        rows: what batches are made of in place of pictures.
        contents: a number for what each text holds, as it was recorded.
    """

    name: str
    given: Any
    dataset: Any
    collate: Callable[[list[Any]], Any]
    views: Views | None = None
    lengths: list[int] | None = None
    rows: Rows = field(default_factory=Rows)
    contents: torch.Tensor | None = None

    @classmethod
    def of(cls, trainer: Trainer, name: str, dataset: Any, views: Views | None = None) -> Source:
        """Of a data set as the trainer's own loaders would read it."""
        if isinstance(dataset, datasets.Dataset):
            return cls(name, dataset, trainer._remove_unused_columns(dataset, name), trainer.data_collator, views)
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, name)
        return cls(name, dataset, dataset, collate, views)

    @property
    def num_views(self) -> int:
        return 1 if self.views is None else self.views.count

    @property
    def num_rows(self) -> int:
        return len(self.dataset) * self.num_views


# ---- texts ----


def has_changed(source: Source, inputs: Batch, numbers: list[int]) -> bool:
    content = None if source.contents is None else content_of(inputs)
    return content is not None and source.contents is not None and bool((content != source.contents[numbers]).any())


def lengths_of(dataset: Any) -> list[int]:
    """Positions of each text that are not padding."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        items = (dataset[i] for i in range(len(dataset)))
        return [int(sum(i["attention_mask"])) if "attention_mask" in i else len(i["input_ids"]) for i in items]
    if "attention_mask" not in dataset.column_names:
        return [int(length) for length in list_lengths(dataset, "input_ids")]
    found: list[int] = []
    for chunk in chunks(dataset, "attention_mask"):
        lengths = pyarrow.compute.list_value_length(chunk).to_numpy()
        ends, sums = np.cumsum(lengths), np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy())])
        found += (sums[ends] - sums[ends - lengths]).tolist()
    return found


def batches_by_length(count: int, lengths: Sequence[int] | None, size: int) -> list[list[int]]:
    """All of `count` examples, those of one length together, the longest first; always in the same batches."""
    order = list(range(count))
    if lengths is not None:
        order.sort(key=lambda number: -lengths[number])
    return [order[i : i + size] for i in range(0, count, size)]


def unpadded(
    value: torch.Tensor, positions: torch.Tensor | None, numbers: list[int], lengths: list[int] | None
) -> list[torch.Tensor]:
    """The rows of each text's own positions."""
    assert lengths is not None
    mask = None if positions is None else positions.cpu()
    rows = [one if mask is None else one[mask[i]] for i, one in enumerate(value)]
    if any(len(row) != lengths[number] for row, number in zip(rows, numbers, strict=True)):
        raise Refused("the collator changes the length of texts")
    return rows


def padded(rows: list[torch.Tensor], positions: torch.Tensor | None) -> torch.Tensor:
    if positions is None:
        return torch.stack(rows)
    found = rows[0].new_zeros((*positions.shape, *rows[0].shape[1:]))
    is_first = bool(positions[:, 0].all())
    for place, mask, row in zip(found, positions, rows, strict=True):
        if is_first and not mask[len(row) :].any():
            place[: len(row)] = row
        else:
            place[mask] = row
    return found
