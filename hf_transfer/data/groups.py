"""Examples that belong together, such as all images of a patient: no split that is made divides them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hf_transfer.data.header import check_column as is_there
from hf_transfer.data.labels import LABELS, MULTI_LABEL, REGRESSION, Labels
from hf_transfer.errors import UserError

Array = np.ndarray[Any, Any]
KEY = "split_group_column_name"
NO_GROUP = "no value in the group column"
_VISITS = 100_000  # groups considered over all random orders
_MOST_ORDERS = 50
_MAX_SHOWN = 3


@dataclass(frozen=True)
class GroupLeak:
    """Groups with examples in two splits that the data itself makes.

    Attributes:
        kept: the later split.
        other: the earlier split.
        groups: number of groups in both.
        examples: examples of `kept` in these groups.
        shown: the first of the groups.
    """

    kept: str
    other: str
    groups: int
    examples: int
    shown: tuple[str, ...]


def groups_of(split: Dataset, column: str) -> list[str | None]:
    """The group of each example as text, so that 7 in one file and "7" in another are the same; None if missing."""
    feature = split.features[column]
    return [group_of(value, feature) for value in split[column][:]]


def group_of(value: Any, feature: Any) -> str | None:
    """The group that a cell of a column names, as text; None if it is empty."""
    if isinstance(feature, ClassLabel):
        value = None if value is None or value < 0 else feature.int2str(value)
    if isinstance(value, float):
        return None if np.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return None if value is None else str(value).strip() or None


def check_column(split: Dataset, column: str, label_column: str) -> None:
    """Check that a split has a column that can name groups.

    Raises:
        UserError: it does not exist, holds the labels, or holds images or lists.
    """
    is_there(column, split.features, KEY)
    if column == label_column:
        raise UserError(
            f"{column!r} is the label column: a class would be in training or held out, never both.",
            "Name the column that says which examples belong together, for example of one patient.",
            key=KEY,
        )
    feature = split.features[column]
    if not isinstance(feature, Value | ClassLabel):
        raise UserError(
            f"column {column!r} contains {type(feature).__name__.lower()} values.",
            "Name a column of texts or numbers.",
            key=KEY,
        )


def without_group(split: Dataset, column: str, skip: bool) -> dict[int, str]:
    """Position → what is wrong with it, of the examples without a group.

    Raises:
        UserError: there are such examples, and they are not skipped.
    """
    missing = [i for i, group in enumerate(groups_of(split, column)) if group is None]
    if missing and not skip:
        raise UserError(
            f"{len(missing):,} training examples have no value in column {column!r} (first: row {missing[0]}), so it "
            "is unknown which others they belong to.",
            "Fill it in, or set on_bad_example: skip to leave these examples out.",
            key=KEY,
        )
    return dict.fromkeys(missing, NO_GROUP)


def draw_groups(split: Dataset, column: str, size: int, labels: Labels, seed: int) -> Array:
    """Positions of whole groups with about `size` examples together, and classes in proportion as far as groups allow.

    Of many random orders in which groups are added as long as that brings the sample closer to its size and its class
    counts, the one that comes closest is taken. Every class keeps an example outside of the sample.

    Args:
        split: with the column `labels`.
        column: holds the group of each example.
        size: examples to draw.
        labels: problem type and classes.
        seed: of the random orders.

    Raises:
        UserError: there is one group only, or every group holds all examples of some class.
    """
    names, numbers = np.unique(np.array(groups_of(split, column)), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"all training examples have the same value in column {column!r} ({names[0]}), so none can be held out.",
            "Provide a validation split, or name another column.",
            key=KEY,
        )
    chance, rng = _Sample.of(split, numbers, labels, size), np.random.default_rng(seed)
    orders = (rng.permutation(len(names)) for _ in range(int(np.clip(_VISITS // len(names), 1, _MOST_ORDERS))))
    chosen = min((chance.filled(order) for order in orders), key=chance.distance)
    if not len(chosen):
        raise UserError(
            f"no group of column {column!r} can be held out: each holds the only examples of a class.",
            "Provide a validation split, or leave the key out.",
            key=KEY,
        )
    return rng.permutation(np.flatnonzero(np.isin(numbers, chosen)))


def shared_groups(splits: Mapping[str, Dataset], column: str) -> list[GroupLeak]:
    """The groups with examples in several splits, for each pair of splits that have the column."""
    named = {name: groups_of(split, column) for name, split in splits.items() if column in split.features}
    leaks = []
    for kept, other in combinations([n for n in ("test", "validation", "train") if n in named], 2):
        both = (set(named[kept]) & set(named[other])) - {None}
        if both:
            shown = tuple(dict.fromkeys(g for g in named[kept] if g is not None and g in both))[:_MAX_SHOWN]
            leaks.append(GroupLeak(kept, other, len(both), sum(g in both for g in named[kept]), shown))
    return leaks


@dataclass(frozen=True)
class _Sample:
    """What a sample of groups should be like.

    Attributes:
        size: examples of the sample.
        total: examples of the split.
        sizes: (groups,) examples of each group.
        classes: (classes,) examples of each class.
        parts: per group (the classes it has, how many examples of each).
    """

    size: int
    total: int
    sizes: Array
    classes: Array
    parts: list[tuple[Array, Array]]

    @classmethod
    def of(cls, split: Dataset, numbers: Array, labels: Labels, size: int) -> _Sample:
        count = len(labels.names)
        if labels.problem_type == REGRESSION:
            rows = values = np.zeros(0, int)
        elif labels.problem_type == MULTI_LABEL:
            rows, values = np.nonzero(np.array(split[LABELS][:]).reshape(-1, count))
        else:
            rows, values = np.arange(len(split)), np.array(split[LABELS][:], dtype=int)
        sizes = np.bincount(numbers)
        pairs, counts = np.unique(numbers[rows] * count + values, return_counts=True)
        ends = np.searchsorted(pairs, np.arange(1, len(sizes)) * count)
        parts = zip(np.split(pairs % count, ends), np.split(counts, ends), strict=True)
        return cls(size, len(split), sizes, np.bincount(values, minlength=count), list(parts))

    def filled(self, order: Iterable[int]) -> list[int]:
        """The groups that are added one after the other; a single one where every group is too large; none if the rest
        would lose a class."""
        chosen, held, drawn, smallest = list[int](), np.zeros(len(self.classes), int), 0, list[int]()
        for group in order:
            classes, counts = self.parts[group]
            examples = int(self.sizes[group])
            if drawn + examples >= self.total or (held[classes] + counts >= self.classes[classes]).any():
                continue
            if not smallest or examples < self.sizes[smallest[0]]:
                smallest = [group]
            gain = self._of_classes(classes, held[classes]) - self._of_classes(classes, held[classes] + counts)
            gain += self._of_size(drawn) - self._of_size(drawn + examples)
            if gain > 0:
                chosen.append(group)
                held[classes] += counts
                drawn += examples
            if drawn >= self.size:
                break
        return chosen or smallest

    def distance(self, chosen: list[int]) -> float:
        """How far a sample is from its size and its class counts; infinite for an empty one."""
        if not chosen:
            return np.inf
        held = np.zeros(len(self.classes), int)
        for classes, counts in (self.parts[group] for group in chosen):
            held[classes] += counts
        return self._of_size(int(self.sizes[chosen].sum())) + self._of_classes(np.arange(len(held)), held)

    def _of_size(self, drawn: int) -> float:
        return ((drawn - self.size) / self.size) ** 2

    def _of_classes(self, classes: Array, held: Array) -> float:
        wanted = self.size * self.classes[classes] / self.total
        return float((((held - wanted) / np.maximum(wanted, 1)) ** 2).sum() / max(1, len(self.classes)))
