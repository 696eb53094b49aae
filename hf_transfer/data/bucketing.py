"""Length bucketing: batches of texts of similar length, which reduces padding.

Each epoch, the examples are shuffled and dealt into chunks of 100 to 200 batches. Each chunk is sorted by jittered
length and cut into batches, and all batches are shuffled. Because examples are shuffled first and lengths are jittered,
texts of the same or similar length are combined differently in each epoch, and data sorted by label is mixed within
batches. A label that correlates with length stays correlated within a batch; no length bucketing can avoid that.
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

JITTER = 0.02  # maximum relative change of a length
# Batches. The smaller a chunk, the less a batch says of its examples' lengths, and the more padding: batches of 64
# sentences are 3.9% padding with chunks of 50, 2.8% with 100, 1.6% in one chunk.
CHUNK = 100  # at least
ORDER = 2  # version of the order; a run resumes only under the one that it began with
_TEXT = "input_ids"


# ---- lengths -------------------------------------------------------------------------------------------------------


def lengths_of(data: Any, column: str, main_input: str = _TEXT) -> torch.Tensor:
    """Lengths of the training examples in tokens, (examples,).

    Args:
        data: training set.
        column: column of precomputed lengths (`length_column_name`), used if it exists.
        main_input: model input to measure if there are no `input_ids`.

    Raises:
        UserError: the data is streamed, or its lengths cannot be determined.
    """
    if isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__len__"):
        raise UserError(
            "length_bucketing: the lengths of a streamed training set are not known in advance.",
            "Remove length_bucketing.",
        )
    columns = data.column_names if isinstance(data, Dataset) else ()
    if column in columns:
        try:
            values = data.with_format(None).select_columns([column])[column][:]
            lengths = np.asarray(values, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise _no_lengths(f"column {column!r}: {one_line(error, 100)}") from error
        return _checked(lengths)
    for name in (_TEXT, main_input):
        if name in columns and len(data):
            return _checked(_of_lists(data, name))
    return _checked(np.array([_of_item(data[i], i, (_TEXT, main_input)) for i in range(len(data))], dtype=np.float64))


def _of_lists(data: Dataset, name: str) -> np.ndarray:
    """Lengths of a column of flat lists."""
    kind = data.data.schema.field(name).type
    if not pyarrow.types.is_nested(kind) or pyarrow.types.is_nested(getattr(kind, "value_type", kind)):
        raise _no_lengths(f"column {name!r} has type {kind}")
    return list_lengths(data, name).astype(np.float64)


def _of_item(item: Any, number: int, names: tuple[str, ...]) -> int:
    values = [item[name] for name in names if name in item] if isinstance(item, Mapping) else []
    if not values:
        raise _no_lengths(f"example {number} has no {' or '.join(dict.fromkeys(names))}")
    if np.ndim(values[0]) != 1:
        raise _no_lengths(f"example {number} has shape {tuple(np.shape(values[0]))}, expected a sequence")
    return len(values[0])


def _checked(lengths: np.ndarray) -> torch.Tensor:
    if (invalid := np.flatnonzero(~(np.isfinite(lengths) & (lengths >= 0)))).size:
        raise _no_lengths(f"the length of example {invalid[0]} is {lengths[invalid[0]]}")
    return torch.from_numpy(lengths)


def _no_lengths(reason: str) -> UserError:
    return UserError(
        f"length_bucketing: cannot determine the lengths of the training examples ({reason}).",
        "Remove length_bucketing, or set length_column_name to a column of lengths.",
    )


def jittered(lengths: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Lengths, each changed a little at random, so that those of like length are combined in other ways each time."""
    return lengths * (1 + JITTER * (2 * torch.rand(len(lengths), generator=generator, dtype=torch.float64) - 1))


# ---- the order -----------------------------------------------------------------------------------------------------


class LengthSampler(torch.utils.data.Sampler[int]):
    """Sampler that yields every example once per epoch, in batches of similar length; deterministic given the epoch.

    An incomplete batch, of any length, comes last. In the first epoch the batch with the longest text comes first, so
    that running out of memory shows immediately.

    Args:
        lengths: (examples,) lengths in tokens.
        size: batch size over all processes.
        seed: seed of the order.
        drop_last: whether the data loader drops the incomplete batch; its examples are then drawn from all lengths.
        fills_last: fill up the incomplete batch by repeating its own examples, so that every process gets a full
            batch. (accelerate would fill it with examples of the first batch, which have a different length.)
    """

    def __init__(self, lengths: torch.Tensor, size: int, seed: int, drop_last: bool = False, fills_last: bool = False):
        self.lengths, self.size, self.seed = lengths, size, seed
        self.drop_last, self.fills_last = drop_last, fills_last and not drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose order is drawn; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        examples = len(self.lengths)
        return math.ceil(examples / self.size) * self.size if self.fills_last else examples

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> torch.Tensor:
        """Indices of this epoch, (len(self),)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        surplus = len(shuffled) % self.size
        dropped = shuffled[:0]
        if self.drop_last and surplus:
            shuffled, dropped, surplus = shuffled[:-surplus], shuffled[-surplus:], 0
        changed = jittered(self.lengths[shuffled], generator)
        # Chunks of equal numbers of batches; the incomplete batch is in the first of them.
        full = max(1, len(shuffled) // self.size)
        batch_of = (torch.arange(len(shuffled)) - surplus).clamp(min=0) // self.size
        chunks = batch_of * max(1, full // CHUNK) // full
        ordered = shuffled[np.lexsort((changed.numpy(), chunks.numpy()))]
        cut = self._cut(ordered[chunks == 0], surplus, generator)
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
        """Start of the incomplete batch: any batch boundary, but in the first epoch not one with the longest text."""
        if not surplus:
            return len(ordered)
        places = len(ordered) // self.size + 1
        place = int(torch.randint(places, (), generator=generator))
        begin = place * self.size
        if self.epoch == 0 and places > 1 and begin <= int(self.lengths[ordered].argmax()) < begin + surplus:
            place = place - 1 if place else 1
        return place * self.size


def padding(lengths: torch.Tensor, order: torch.Tensor, batch: int) -> float:
    """Fraction of padding tokens when `order` is cut into batches of `batch` examples."""
    ordered, full = lengths[order], len(order) // batch * batch
    padded = float(ordered[:full].view(-1, batch).amax(1).sum()) * batch
    if full < len(ordered):
        padded += float(ordered[full:].max()) * (len(ordered) - full)
    return 1 - float(ordered.sum()) / padded if padded else 0.0


def describe(sampler: LengthSampler, processes: int) -> str:
    """One line comparing the padding of bucketed and random batches in the first epoch; each process pads its own."""
    batch = sampler.size // processes
    shuffled = torch.randperm(len(sampler.lengths), generator=torch.Generator().manual_seed(sampler.seed))
    bucketed, random = (padding(sampler.lengths, order, batch) for order in (sampler.order(), shuffled))
    return f"length_bucketing: {bucketed:.1%} of tokens are padding ({random:.1%} in random batches)"


_ROWS = 10_000  # rows read at a time


def list_lengths(dataset: datasets.Dataset, column: str) -> np.ndarray[Any, Any]:
    """Length of each list in a column, (examples,), without reading the items; NaN for missing lists."""
    lengths = [pyarrow.compute.list_value_length(c) for c in chunks(dataset, column)]
    return np.concatenate([one.to_numpy(zero_copy_only=False) for one in lengths])


def chunks(dataset: datasets.Dataset, column: str) -> Iterator[Any]:
    """Arrow arrays of a column, a limited number of rows at a time."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(_ROWS):
        yield from table[column].chunks
