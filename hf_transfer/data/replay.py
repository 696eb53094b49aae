"""Replay: examples of earlier data between those of the training set (Robins 1995; Rolnick et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

EARLIER = "earlier"  # key in a batch: the replayed examples of another task, as a batch of their own with its labels
_DENOMINATOR = 10_000
_ORDER, _SOURCE = 0, 1  # what is drawn


@dataclass(frozen=True)
class Replay:
    """Earlier data.

    Attributes:
        dataset: prepared as the training set is, with labels of the run, or of the task that it is of.
        fraction: of the examples of each batch, between 0 and 1.
        apart: whether it is of another task than the run's, and comes as a batch within the batch (`EARLIER`).
    """

    dataset: Any
    fraction: float
    apart: bool = False


class Both(Dataset[Any]):
    """Two map-style datasets as one: the second's examples are numbered after the first's."""

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, number: int) -> Any:
        count = len(self.first)
        return self.first[number] if number < count else self.second[number - count]


class Apart(Both):
    """The same, where each example comes with whether it is of the second."""

    def __getitem__(self, number: int) -> tuple[bool, Any]:
        return number >= len(self.first), super().__getitem__(number)


class ApartCollator:
    """Makes a batch of the examples of an `Apart`: its first dataset's, and in it, as `EARLIER`, one of the second's.

    Args:
        collate: makes a batch of the first's examples.
        collate_earlier: likewise of the second's.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], collate_earlier: Callable[[list[Any]], Any]):
        self.collate, self.collate_earlier = collate, collate_earlier

    def __call__(self, examples: Sequence[tuple[bool, Any]]) -> dict[str, Any]:
        earlier = [example for is_earlier, example in examples if is_earlier]
        batch = dict(self.collate([example for is_earlier, example in examples if not is_earlier]))
        return {**batch, EARLIER: dict(self.collate_earlier(earlier))} if earlier else batch


def both(first: Any, replay: Replay) -> Both:
    """The dataset that the numbers of a `ReplaySampler` are of."""
    return (Apart if replay.apart else Both)(first, replay.dataset)


def least_batch(fraction: float) -> int:
    """The smallest batch that always has an example of the training set."""
    return math.ceil(1 / (1 - Fraction(fraction).limit_denominator(_DENOMINATOR)))


class ReplaySampler(Sampler[int]):
    """The order of an epoch: every example of the training set once, shuffled, and earlier examples between them.

    Place i of an epoch is a replayed example where floor((i + 1) f) > floor(i f), so that among any B neighbors there
    are floor(B f) or ceil(B f) of them, whatever the batch size, the accumulation or the number of processes is. The
    earlier data is drawn without replacement, pass after pass and over epochs. Everything is a function of the seed and
    the epoch.

    Args:
        count: examples of the training set, numbered from 0.
        earlier: examples of the earlier data, numbered after them.
        fraction: f, above 0 and below 1, to 4 digits.
        seed: of the draws.
    """

    def __init__(self, count: int, earlier: int, fraction: float, seed: int):
        share = Fraction(fraction).limit_denominator(_DENOMINATOR)
        self.count, self.earlier, self.seed, self.epoch = count, earlier, seed, 0
        self.share = min(max(share, Fraction(1, _DENOMINATOR)), Fraction(_DENOMINATOR - 1, _DENOMINATOR))
        self.places = int((count - 1) / (1 - self.share)) + 1  # the fewest that hold all of the training set

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.places

    @property
    def replayed(self) -> int:
        """The number of earlier examples in an epoch."""
        return self.places - self.count

    def __iter__(self) -> Iterator[int]:
        own = iter(self._shuffled(self.count, _ORDER, self.epoch))
        earlier = self._earlier(self.epoch * self.replayed)
        for place in range(self.places):
            is_replayed = int((place + 1) * self.share) > int(place * self.share)
            yield self.count + next(earlier) if is_replayed else next(own)

    def _earlier(self, start: int) -> Iterator[int]:
        """The draws of the earlier data from the one numbered `start` on."""
        passed, skipped = divmod(start, self.earlier)
        while True:
            yield from self._shuffled(self.earlier, _SOURCE, passed)[skipped:]
            passed, skipped = passed + 1, 0

    def _shuffled(self, count: int, what: int, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 2 + what) * 1_000_003 + turn)
        return torch.randperm(count, generator=generator).tolist()
