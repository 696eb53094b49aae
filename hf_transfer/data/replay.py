"""Replay: examples of earlier data between those of the training set (Robins 1995; Rolnick et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

_DENOMINATOR = 10_000
_ORDER, _SOURCE = 0, 1  # what is drawn


@dataclass(frozen=True)
class Replay:
    """Earlier data.

    Attributes:
        dataset: prepared as the training set is, with labels of the run.
        fraction: of the examples of each batch, between 0 and 1.
    """

    dataset: Any
    fraction: float


class Both(Dataset[Any]):
    """Two map-style datasets as one: the second's examples are numbered after the first's."""

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, number: int) -> Any:
        count = len(self.first)
        return self.first[number] if number < count else self.second[number - count]


def both(first: Any, second: Any) -> Both:
    """The dataset that the numbers of a `ReplaySampler` are of."""
    return Both(first, second)


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
