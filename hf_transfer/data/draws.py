"""Random samples of a split: stratified, and without losing a class from the part that has to keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from datasets.utils.stratify import stratified_shuffle_split_generate_indices

from hf_transfer.data.labels import LABELS, MULTI_LABEL, REGRESSION, Labels

Array = np.ndarray[Any, Any]
Part = Literal["rest", "sample"]


@dataclass(frozen=True)
class Drawn:
    """A split in two parts.

    Attributes:
        rest: what was not drawn.
        sample: what was drawn.
        stratified: whether the sample was drawn class by class.
    """

    rest: Dataset
    sample: Dataset
    stratified: bool


def draw(split: Dataset, size: int, labels: Labels, seed: int, keep: Part | None = None) -> Drawn:
    """A sample of a split, in proportion to its classes; at random for regression and for several labels per example.

    Where proportion and `keep` allow it, the rows are those that `datasets` draws.

    Args:
        split: with the column `labels`.
        size: examples to draw, fewer than there are.
        labels: problem type and classes.
        seed: of the draw.
        keep: the part that has an example of every class of the split. The rest keeps them by giving up examples of
            the sample, which can end up smaller, and empty; the sample keeps them unless `size` is too small.
    """
    usual = _as_datasets_draws(split, size, labels, seed)
    if usual is not None and (keep is None or _has_all(getattr(usual, keep), split, labels)):
        return usual
    rng = np.random.default_rng(seed)
    if labels.problem_type == MULTI_LABEL:
        rows = np.array(split[LABELS][:], dtype=bool)
        chosen = _thinned(rows, size, rng) if keep == "rest" else _covering(rows, size, rng)
    else:
        chosen = _by_class(np.array(split[LABELS][:], dtype=int), size, rng, keep)
    rest = rng.permutation(np.setdiff1d(np.arange(len(split)), chosen))
    return Drawn(split.select(rest), split.select(chosen), labels.problem_type != MULTI_LABEL)


def stratified(split: Dataset, column: str, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """(the rest, a sample), the same rows as from `train_test_split(stratify_by_column=column)` of `datasets`.

    Its indices are asked for directly, since it reads the column cell by cell: a second per 8,000 examples.

    Args:
        split: the examples.
        column: holds the class indices, each at least twice.
        size: examples to draw.
        seed: of the draw.
    """
    values, rng = np.array(split[column][:]), np.random.default_rng(seed)
    rest, sample = next(stratified_shuffle_split_generate_indices(values, len(split) - size, size, rng))
    return split.select(rest), split.select(sample)


def class_counts(split: Dataset, labels: Labels) -> Array:
    """(classes,) number of examples of each class; empty for regression."""
    if labels.problem_type == REGRESSION:
        return np.zeros(0, int)
    values, count = split[LABELS][:], len(labels.names)
    if labels.problem_type == MULTI_LABEL:
        return np.array(values, dtype=int).reshape(-1, count).sum(0)
    return np.bincount(np.array(values, dtype=int), minlength=count)


def _as_datasets_draws(split: Dataset, size: int, labels: Labels, seed: int) -> Drawn | None:
    """As `train_test_split` of `datasets`; None where it cannot stratify classes."""
    if labels.problem_type in (MULTI_LABEL, REGRESSION):
        parts = split.train_test_split(test_size=size, seed=seed)
        return Drawn(parts["train"], parts["test"], False)
    counts = class_counts(split, labels)
    counts = counts[counts > 0]
    if counts.min() < 2 or len(counts) > min(size, len(split) - size):
        return None
    return Drawn(*stratified(split, LABELS, size, seed), True)


def _has_all(part: Dataset, split: Dataset, labels: Labels) -> bool:
    return bool(((class_counts(part, labels) > 0) == (class_counts(split, labels) > 0)).all())


def _by_class(values: Array, size: int, rng: np.random.Generator, keep: Part | None) -> Array:
    """Positions of a sample with `size` examples, or as many as `keep` allows, in proportion to the classes.

    Args:
        values: (examples,) class of each example.
        size: examples to draw.
        rng: source of randomness.
        keep: the part in which every class keeps an example.
    """
    numbers = _shares(np.bincount(values), size, rng, keep)
    order = rng.permutation(len(values))
    by_class = order[np.argsort(values[order], kind="stable")]
    starts = np.cumsum(np.bincount(values)) - np.bincount(values)
    return rng.permutation(np.concatenate([by_class[s : s + n] for s, n in zip(starts, numbers, strict=True)]))


def _shares(counts: Array, size: int, rng: np.random.Generator, keep: Part | None) -> Array:
    """(classes,) number of examples to draw of each: shares by largest remainder within the bounds of `keep`."""
    least = (counts > 0).astype(int) if keep == "sample" and size >= (counts > 0).sum() else np.zeros_like(counts)
    most = np.maximum(counts - 1, 0) if keep == "rest" else counts
    size = min(size, int(most.sum()))
    exact = size * counts / counts.sum() + rng.uniform(0, 1e-9, len(counts))  # ties are broken at random
    numbers = np.clip(np.floor(exact).astype(int), least, most)
    while numbers.sum() < size:
        numbers[np.argmax(np.where(numbers < most, exact - numbers, -np.inf))] += 1
    while numbers.sum() > size:
        numbers[np.argmax(np.where(numbers > least, numbers - exact, -np.inf))] -= 1
    return numbers


def _thinned(rows: Array, size: int, rng: np.random.Generator) -> Array:
    """Positions of up to `size` examples whose removal leaves an example of every label.

    Args:
        rows: (examples, labels) bool.
        size: examples to draw.
        rng: source of randomness.
    """
    left, chosen = rows.sum(0), list[int]()
    for i in rng.permutation(len(rows)):
        if len(chosen) < size and (left[rows[i]] > 1).all():
            left -= rows[i]
            chosen.append(int(i))
    return np.array(chosen, dtype=int)


def _covering(rows: Array, size: int, rng: np.random.Generator) -> Array:
    """Positions of `size` examples, among them one of every label if the greedy choice finds them.

    Args:
        rows: (examples, labels) bool.
        size: examples to draw.
        rng: source of randomness.
    """
    order = rng.permutation(len(rows))
    shuffled, uncovered, chosen = rows[order], rows.any(0), list[int]()
    while uncovered.any() and len(chosen) < size:
        rarest = np.flatnonzero(uncovered)[np.argmin(rows.sum(0)[uncovered])]
        holders = np.flatnonzero(shuffled[:, rarest])
        best = holders[np.argmax(shuffled[holders][:, uncovered].sum(1))]
        chosen.append(int(best))
        uncovered &= ~shuffled[best]
    rest = np.setdiff1d(np.arange(len(rows)), chosen)
    return rng.permutation(order[np.concatenate([np.array(chosen, dtype=int), rest[: size - len(chosen)]])])
