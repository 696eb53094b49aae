"""Batches of texts of similar length, so that little of what is computed is padding.

The order of an epoch is drawn, then sorted by length, cut into batches, and the batches are drawn. Because the draw
comes first and lengths are jittered, texts of equal and nearly equal length meet others in each epoch, and data that is
sorted by label is mixed within batches as it is in random ones. What is tied to length (long texts are the angry
ones) is together in a batch: that no batching by length can help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset

from hf_transfer.errors import UserError, one_line

JITTER = 0.02  # share of its length by which a text may pass for longer or shorter in an epoch
_TEXT = "input_ids"


# ---- lengths -------------------------------------------------------------------------------------------------------


def lengths_of(data: Any, column: str, main_input: str = _TEXT) -> torch.Tensor:
    """The length of every training example, (examples,), in tokens.

    Args:
        data: the training set.
        column: holds lengths, where it is there (`length_column_name`).
        main_input: the model's input whose length counts where there are no `input_ids`.

    Raises:
        UserError: the data is a stream, or has no lengths.
    """
    if isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__len__"):
        raise UserError(
            "length_bucketing: a stream of training examples has no length, and theirs are not known in advance.",
            "Leave length_bucketing out.",
        )
    columns = data.column_names if isinstance(data, Dataset) else ()
    if column in columns:
        try:
            given = data.with_format(None).select_columns([column])[column][:]
            return _checked(np.asarray(given, dtype=np.float64))
        except (ValueError, TypeError) as error:
            raise _no_lengths(f"its column {column!r}: {one_line(error, 100)}") from error
    for name in (_TEXT, main_input):
        if name in columns and len(data):
            return _checked(_of_lists(data, name))
    return _checked(np.array([_of_item(data[i], i, (_TEXT, main_input)) for i in range(len(data))], dtype=np.float64))


def _of_lists(data: Dataset, name: str) -> np.ndarray:
    """Of a column of lists, without reading what they hold; NaN where there is none."""
    kind = data.data.schema.field(name).type
    if not pyarrow.types.is_nested(kind) or pyarrow.types.is_nested(getattr(kind, "value_type", kind)):
        raise _no_lengths(f"its column {name!r} holds {kind}")
    return list_lengths(data, name).astype(np.float64)


def _of_item(item: Any, number: int, names: tuple[str, ...]) -> int:
    values = [item[name] for name in names if name in item] if isinstance(item, Mapping) else []
    if not values:
        raise _no_lengths(f"example {number} has no {' or '.join(dict.fromkeys(names))}")
    if np.ndim(values[0]) != 1:
        raise _no_lengths(f"example {number} is no sequence but has the shape {tuple(np.shape(values[0]))}")
    return len(values[0])


def _checked(lengths: np.ndarray) -> torch.Tensor:
    if (wrong := np.flatnonzero(~(np.isfinite(lengths) & (lengths >= 0)))).size:
        raise _no_lengths(f"that of example {wrong[0]} is {lengths[wrong[0]]}")
    return torch.from_numpy(lengths)


def _no_lengths(why: str) -> UserError:
    return UserError(
        f"length_bucketing: the training examples have no lengths to sort them by ({why}).",
        "Leave it out, or name a column of lengths with length_column_name.",
    )


# ---- the order -----------------------------------------------------------------------------------------------------


class LengthSampler(torch.utils.data.Sampler[int]):
    """Every example once in an epoch, `size` of similar length after each other; the same for the same epoch.

    One run of fewer than `size`, of any length, stands last, where a loader cuts its short batch. In the first epoch
    the longest text is in the first batch: if the memory does not suffice, that shows at once.

    Args:
        lengths: (examples,).
        size: examples that all processes together take at a time.
        seed: of the order.
        drop_last: the loader drops its short batch: what is in it is drawn from all lengths.
        fills_last: the short batch is filled up by repeating its own examples, so that every process gets a full one.
            (accelerate would fill it with those of the first batch, which are of another length.)
    """

    def __init__(self, lengths: torch.Tensor, size: int, seed: int, drop_last: bool = False, fills_last: bool = False):
        self.lengths, self.size, self.seed = lengths, size, seed
        self.drop_last, self.fills_last = drop_last, fills_last and not drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        examples = len(self.lengths)
        return math.ceil(examples / self.size) * self.size if self.fills_last else examples

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> torch.Tensor:
        """(draws,) indices of this epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = torch.randperm(len(self.lengths), generator=generator)
        surplus = len(drawn) % self.size
        dropped = drawn[:0]
        if self.drop_last and surplus:
            drawn, dropped, surplus = drawn[:-surplus], drawn[-surplus:], 0
        jitter = 1 + JITTER * (2 * torch.rand(len(drawn), generator=generator, dtype=torch.float64) - 1)
        ordered = drawn[(self.lengths[drawn] * jitter).argsort(stable=True)]
        cut = self._cut(ordered, surplus, generator)
        short = ordered[cut : cut + surplus]
        batches = torch.cat((ordered[:cut], ordered[cut + surplus :])).view(-1, self.size)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        if self.epoch == 0 and len(batches):
            longest = int(self.lengths[batches].amax(1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        if self.fills_last and surplus:
            short = short.repeat(math.ceil(self.size / surplus))[: self.size]
        return torch.cat((batches.flatten(), short, dropped))

    def _cut(self, ordered: torch.Tensor, surplus: int, generator: torch.Generator) -> int:
        """Where the short batch begins: at any batch, but in the first epoch at none that has the longest text."""
        if not surplus:
            return len(ordered)
        places = len(ordered) // self.size + 1
        place = int(torch.randint(places, (), generator=generator))
        begin = place * self.size
        if self.epoch == 0 and places > 1 and begin <= int(self.lengths[ordered].argmax()) < begin + surplus:
            place = place - 1 if place else 1
        return place * self.size


def padding(lengths: torch.Tensor, order: torch.Tensor, batch: int) -> float:
    """The share of padding among the tokens of an order that is cut into batches of `batch` examples."""
    parts = [lengths[part] for part in order.split(batch) if len(part)]
    padded = sum(float(part.max()) * len(part) for part in parts)
    return 1 - sum(float(part.sum()) for part in parts) / padded if padded else 0.0


def describe(sampler: LengthSampler, processes: int) -> str:
    """What is gained, in the first epoch: one line. Each process pads its share of the `size` examples for itself."""
    batch = sampler.size // processes
    drawn = torch.randperm(len(sampler.lengths), generator=torch.Generator().manual_seed(sampler.seed))
    ours, random = (padding(sampler.lengths, order, batch) for order in (sampler.order(), drawn))
    return f"length_bucketing: {ours:.1%} of tokens are padding ({random:.1%} in random batches)"


_ROWS = 10_000  # read at a time


def list_lengths(dataset: datasets.Dataset, column: str) -> np.ndarray[Any, Any]:
    """(examples,): how long each list of a column is, without reading what it holds; NaN among them where there is
    none."""
    return np.concatenate([pyarrow.compute.list_value_length(c).to_numpy() for c in chunks(dataset, column)])


def chunks(dataset: datasets.Dataset, column: str) -> Iterator[Any]:
    for table in dataset.select_columns([column]).with_format("arrow").iter(_ROWS):
        yield from table[column].chunks
