"""Examples of a target domain with labels that the model itself gave them (Lee 2013), next to those of the source.

Which examples get a label, and when it is better to stop, is decided here; who answers is `training.self_training`.
A source example comes with a target example of its own class, as far as any has a label: the classes of the target are
trained on as often as those of the source (class balance, as in Zou et al. 2018). Which one depends only on the seed,
the epoch, the labels and the number of the source example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from hf_transfer.config.arguments.adaptation import PER_CLASS, QUANTILE
from hf_transfer.data.augment import Chance
from hf_transfer.data.labels import IGNORED, LABELS
from hf_transfer.data.pairs import Example, alike, items

Array = Any  # np.ndarray
COLLAPSED = 0.5  # of the entropy of the source's labels, below which the target's have collapsed


# ---- which examples get a label --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What a round of labeling came to.

    Attributes:
        number: of the round, counted from 1.
        epoch: before which it took place.
        labeled: examples with a label, by class.
        answered: examples that were answered with each class, with a label or without.
        threshold: least probability of a label, by class; None for a class without labels.
        entropy: of `answered`, in nats.
        source_entropy: of the source's labels.
    """

    number: int
    epoch: int
    labeled: list[int]
    answered: list[int]
    threshold: list[float | None]
    entropy: float
    source_entropy: float

    @property
    def collapsed(self) -> bool:
        """Whether the answers fall into so few classes that labels from them would make it worse."""
        return self.entropy < COLLAPSED * self.source_entropy

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "collapsed": self.collapsed}


def label(
    logits: Array, threshold: float | str, done: float, source: Sequence[int], number: int, epoch: int
) -> tuple[Array, Round]:
    """((examples,) class or IGNORED, what the round came to).

    A number labels what is at least so probable. `quantile` labels the most probable fraction `done` of all examples,
    which grows from round to round (curriculum labeling, Cascante-Bonilla et al. 2021), `per-class` the same fraction
    of the examples that are answered with each class (class-balanced self-training, Zou et al. 2018, section 4.2).

    Args:
        logits: (examples, classes).
        threshold: `pseudo_label_threshold`.
        done: fraction between 0 and 1.
        source: number of the source's examples by class.
        number: of the round.
        epoch: before which it takes place.
    """
    p = softmax(np.asarray(logits, dtype=np.float64), axis=1)
    answers, sure = p.argmax(1), p.max(1)
    if isinstance(threshold, str):
        groups = {QUANTILE: [np.arange(len(p))], PER_CLASS: [np.flatnonzero(answers == c) for c in range(p.shape[1])]}
        kept = np.concatenate([_surest(rows, sure, done) for rows in groups[threshold]])
    else:
        kept = np.flatnonzero(sure >= threshold)
    labels = np.full(len(p), IGNORED)
    labels[kept] = answers[kept]
    counts = [int((labels == c).sum()) for c in range(p.shape[1])]
    answered = np.bincount(answers, minlength=p.shape[1]).tolist()
    least = [float(sure[labels == c].min()) if counts[c] else None for c in range(p.shape[1])]
    return labels, Round(number, epoch, counts, answered, least, _entropy(answered), _entropy(source))


def _surest(rows: Array, sure: Array, fraction: float) -> Array:
    """The rows of the highest values, of equal ones the first."""
    return rows[np.argsort(-sure[rows], kind="stable")[: int(np.ceil(fraction * len(rows)))]]


def _entropy(counts: Sequence[int]) -> float:
    """Of classes that are so frequent, in nats."""
    shares = np.asarray([count for count in counts if count], dtype=np.float64)
    shares /= shares.sum()
    return float(-(shares * np.log(shares)).sum())


# ---- as training examples --------------------------------------------------------------------------------------------


class LabeledTargets:
    """A target domain, some of whose examples have a label; takes the place of `pairs.Targets`.

    Labels and epoch are in shared memory, where the workers of a loader see them change.

    Args:
        dataset: examples of the target, as the model takes them.
        classes: (source examples,) class of each.
        seed: of the draws.
        lengths: of the source examples and of the target examples, in tokens; None where any may come with any.

    Attributes:
        labels: (target examples,) class or IGNORED; set by `set_labels`.
    """

    labeled = True

    def __init__(
        self,
        dataset: Any,
        classes: Sequence[int],
        seed: int,
        lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.dataset, self.lengths = dataset, lengths
        self.chance = Chance(seed)
        self.labels = torch.full((len(dataset),), IGNORED).share_memory_()
        self._turn = torch.zeros(1, dtype=torch.int64).share_memory_()  # how often the labels were set
        of_source = np.asarray(classes)
        self._classes = of_source
        self._counts = np.bincount(of_source)
        order = np.argsort(of_source, kind="stable")
        starts = np.cumsum(self._counts) - self._counts
        self._ranks = np.empty(len(of_source), dtype=np.int64)  # within the examples of the same class
        self._ranks[order] = np.arange(len(of_source)) - starts[of_source[order]]
        self._of_class = np.split(order, starts[1:])  # numbers of the source's examples, by rank
        self._members: dict[int, list[int]] = {}
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._known = (-1, -1)

    @property
    def counts(self) -> list[int]:
        """Source examples by class."""
        return [int(count) for count in self._counts]

    def set_labels(self, labels: Array | torch.Tensor) -> None:
        """Train on these from the next batch that is loaded."""
        self.labels.copy_(torch.as_tensor(labels))
        self._turn += 1

    def of(self, numbers: Sequence[int]) -> list[int | None]:
        """The target example of each source example in this epoch; None where none has its class."""
        state = (int(self._turn), self.chance.epoch)
        if state != self._known:
            self._known, self._orders = state, {}
            known = self.labels.numpy()
            self._members = {c: np.flatnonzero(known == c).tolist() for c in range(len(self._counts))}
        return [self._of_one(number) for number in numbers]

    def _of_one(self, number: int) -> int | None:
        own = int(self._classes[number])
        members = self._members[own]
        if not members:
            return None
        turn, place = divmod(self.chance.epoch * int(self._counts[own]) + int(self._ranks[number]), len(members))
        if (own, turn) not in self._orders:
            with self.chance.fixed_seed(own, turn):
                order = torch.tensor(members)[torch.randperm(len(members))]
                if self.lengths is not None:
                    ranks = np.arange(turn * len(members), (turn + 1) * len(members)) % self._counts[own]
                    order = alike(order, self.lengths[0][self._of_class[own][ranks]], self.lengths[1])
            self._orders[own, turn] = order.tolist()
        return self._orders[own, turn][place]

    def beside(self, numbers: Sequence[int], examples: Sequence[Example]) -> list[tuple[Example, Example | None]]:
        """Each source example with a target example of its class, which has the label; `numbers` are the source's."""
        partners = self.of(numbers)
        labeled = [partner for partner in partners if partner is not None]
        found = iter(items(self.dataset, labeled) if labeled else [])  # a transform may not take a batch of none
        return [
            (example, None if partner is None else {**next(found), LABELS: int(self.labels[partner])})
            for example, partner in zip(examples, partners, strict=True)
        ]

    def full(self, numbers: Sequence[int], examples: Sequence[Example]) -> list[tuple[Example, Example]]:
        """As if all of the target were labeled, with any target example of each source example's class."""
        partners = items(self.dataset, [number % len(self.dataset) for number in numbers])
        return [
            (example, {**partner, LABELS: int(self._classes[number])})
            for number, example, partner in zip(numbers, examples, partners, strict=True)
        ]
