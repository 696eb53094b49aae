"""Examples of a target domain next to those of the source: each source example of a batch comes with a target example.

Which one depends only on the seed, the epoch and the number of the source example: not on the order of the batches, the
workers, the number of processes, or a resumed run. The target is gone through again and again, shuffled anew each time,
so that all its examples are seen equally often.

Texts come with texts of like length, the shortest of one domain with the shortest of the other: a batch is then padded
little, and where batches are of similar length, its two halves differ by their domain and not by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from hf_transfer.data.augment import Chance, Mixed
from hf_transfer.data.bucketing import jittered
from hf_transfer.data.labels import LABELS
from hf_transfer.errors import UserError, listed

DOMAIN = "domain"  # key in a batch: (examples,), 0 of the source and 1 of the target; labeled examples come first
LABEL_NAMES = (LABELS, "label", "label_ids")
Example = dict[str, Any]


def alike(order: torch.Tensor, beside: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Shuffled examples, the shortest next to the shortest source example, and so on, up to a jitter.

    Args:
        order: (n,) numbers of the examples.
        beside: (n,) lengths of the source examples that they come with.
        lengths: of all examples, by number.
    """
    places, by_length = (jittered(each).argsort(stable=True) for each in (beside, lengths[order]))
    found = torch.empty_like(order)
    found[places] = order[by_length]
    return found


class Partners:
    """Numbers of target examples for source examples.

    Args:
        sources: number of source examples.
        targets: number of target examples.
        seed: of the shuffles.
        lengths: of the source examples and of the target examples, in tokens; None where any may come with any.
    """

    def __init__(self, sources: int, targets: int, seed: int, lengths: tuple[torch.Tensor, torch.Tensor] | None = None):
        self.sources, self.targets, self.lengths = sources, targets, lengths
        self.chance = Chance(seed)  # its epoch is in shared memory, where workers see it change
        self._orders: dict[int, list[int]] = {}
        self._epoch = -1

    def of(self, numbers: Sequence[int]) -> list[int]:
        """The target example of each source example in this epoch."""
        epoch = self.chance.epoch
        if epoch != self._epoch:
            self._orders, self._epoch = {}, epoch
        places = (divmod(epoch * self.sources + number, self.targets) for number in numbers)
        return [self._order(turn)[place] for turn, place in places]

    def _order(self, turn: int) -> list[int]:
        """The shuffled target in a turn through it."""
        if turn not in self._orders:
            with self.chance.fixed_seed(turn):
                order = torch.randperm(self.targets)
                if self.lengths is not None:
                    beside = torch.arange(turn * self.targets, (turn + 1) * self.targets) % self.sources
                    order = alike(order, self.lengths[0][beside], self.lengths[1])
            self._orders[turn] = order.tolist()
        return self._orders[turn]


class Targets:
    """A target domain, as batches are made from it.

    Args:
        dataset: its examples, as the model takes them; labels are not read.
        partners: which of them come with which source examples.
    """

    labeled = False

    def __init__(self, dataset: Any, partners: Partners):
        self.dataset, self.partners = dataset, partners

    @property
    def chance(self) -> Chance:
        """Knows the epoch."""
        return self.partners.chance

    def beside(self, numbers: Sequence[int], examples: Sequence[Example]) -> list[tuple[Example, Example]]:
        """Each source example with its target example; `numbers` are those of the source examples."""
        partners = self.partners.of(numbers)
        return list(zip(examples, items(self.dataset, partners), strict=True))

    full = beside


class Beside(Protocol):
    """A target, as batches are made from it: `Targets`, or `pseudo_labels.LabeledTargets`.

    Attributes:
        dataset: its examples.
        labeled: whether they have labels to train on.
    """

    dataset: Any
    labeled: bool

    @property
    def chance(self) -> Chance: ...
    def beside(
        self, numbers: Sequence[int], examples: Sequence[Example]
    ) -> Sequence[tuple[Example, Example | None]]: ...
    def full(self, numbers: Sequence[int], examples: Sequence[Example]) -> Sequence[tuple[Example, Example]]:
        """As `beside`, where every source example has its target example: the largest batch that a run may see."""


class Pairs(Dataset[tuple[Example, "Example | None"]]):
    """A training set as pairs with a target.

    Args:
        dataset: the source, and after it labeled examples of the target, if there are any.
        targets: the target.
        sources: number of examples of the source.
    """

    def __init__(self, dataset: Any, targets: Beside, sources: int | None = None):
        self.dataset, self.targets = dataset, targets
        self.sources = len(dataset) if sources is None else sources

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Example, Example | None]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> Sequence[tuple[Example, Example | None]]:
        examples = zip(numbers, items(self.dataset, list(numbers)), strict=True)
        marked = [example if number < self.sources else {**example, DOMAIN: 1} for number, example in examples]
        return self.targets.beside(numbers, marked)


class PairsCollator:
    """Makes one batch of pairs: the training examples first, which have labels, then the target's, marked by `DOMAIN`.

    Labeled examples of the target are among the first. Both are padded alike. Mixup and cutmix mix the first only.
    Labels are those of the first alone, unless the target's examples have labels to train on. A training example may
    stand alone.

    Args:
        collate: makes a batch from a list of examples.
        labeled: whether the target's examples have labels (`LABELS`) to train on.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], labeled: bool = False):
        self.collate, self.labeled = collate, labeled

    def __call__(self, pairs: Sequence[tuple[Example, Example | None]]) -> dict[str, Any]:
        domain = [int(source.get(DOMAIN, 0)) for source, _ in pairs]
        sources = [{n: value for n, value in source.items() if n != DOMAIN} for source, _ in pairs]
        found = zip(sources, (target for _, target in pairs), strict=True)
        targets = [self._like(source, target) for source, target in found if target is not None]
        if isinstance(self.collate, Mixed):
            batch = self.collate(sources)
            batch = _both(batch, self.collate.unmixed(targets)) if targets else batch
        else:
            batch = dict(self.collate([*sources, *targets]))
        if LABELS in batch and not self.labeled:
            batch[LABELS] = batch[LABELS][: len(pairs)]
        return batch | {DOMAIN: torch.tensor([*domain, *([1] * len(targets))])}

    def _like(self, source: Example, target: Example) -> Example:
        """A target example with the keys of a source example, so that any collator takes it.

        Without labels to train on, it has the label of the source, which is cut off.
        """
        own = target[LABELS] if self.labeled else None
        return {
            name: (value if own is None else own) if name in LABEL_NAMES else target[name]
            for name, value in source.items()
        }


def _both(batch: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Two batches as one; the labels of the second become weights of the classes, if those of the first are."""
    labels, own = batch.get(LABELS), others.get(LABELS)
    if labels is not None and own is not None and labels.ndim > own.ndim:
        others = others | {LABELS: torch.nn.functional.one_hot(own, labels.shape[1]).to(labels)}
    return {name: torch.cat([value, others[name]]) for name, value in batch.items()}


def check_inputs(source: Example, target: Example) -> None:
    """Check that an example of the target has the inputs of one of the source.

    Raises:
        UserError: it has not.
    """
    if missing := [name for name in source if name not in target and name not in LABEL_NAMES]:
        raise UserError(
            f"the target's examples have no {listed(missing)}, which those of the source have.",
            "Prepare source and target in the same way.",
            key="target_dataset",
        )


def items(dataset: Any, numbers: Sequence[int]) -> list[Any]:
    """Examples of a dataset by number."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(list(numbers)))
    return [dataset[number] for number in numbers]
