"""What a classifier gets right and wrong, class by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.intervals import class_intervals
from hf_transfer.evaluation.scores import Array

MOST_CONFUSIONS = 10  # pairs that are listed


def per_class(problem_type: str, logits: Array, labels: Array, limits: Array | float = 0.0) -> list[dict[str, Any]]:
    """Precision, recall and support of each class, in the order of the outputs; empty for regression.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, classes).
        labels: (examples,) class indices, or (examples, classes) of 0 and 1.
        limits: several labels per example: the logit above which a label is predicted, one for all or (classes,).

    Returns:
        A dict per class with `precision` (None if the class was never predicted), `recall` (None if it has no
        examples) and `support`, its number of examples.
    """
    return [
        {
            "precision": hits / predicted if predicted else None,
            "recall": hits / true if true else None,
            "support": true,
        }
        for hits, true, predicted in _counts(problem_type, logits, labels, limits)
    ]


def with_intervals(
    problem_type: str, names: Sequence[str], logits: Array, labels: Array, limits: Array | float = 0.0
) -> list[dict[str, Any]]:
    """`per_class` with `label`, `f1` (None for a class without examples and predictions) and 95% `intervals`.

    Args:
        problem_type: as of `per_class`, like the others.
        names: of the classes.
        logits: likewise.
        labels: likewise.
        limits: likewise.
    """
    found = named(names, per_class(problem_type, logits, labels, limits))
    for one, (hits, true, predicted) in zip(found, _counts(problem_type, logits, labels, limits), strict=True):
        one["f1"] = 2 * hits / (true + predicted) if true + predicted else None
        one["intervals"] = class_intervals(hits, true, predicted, len(labels))
    return found


def _counts(problem_type: str, logits: Array, labels: Array, limits: Array | float) -> Iterator[tuple[int, int, int]]:
    """(true positives, examples, predictions) of each class."""
    if problem_type == REGRESSION:
        return iter(())
    if problem_type == MULTI_LABEL:
        counts = scores.label_counts(logits, labels, limits)
    else:
        counts = scores.class_counts(labels, logits.argmax(-1), logits.shape[-1])
    return zip(*(c.tolist()[: logits.shape[-1]] for c in counts), strict=True)


def most_confused(confusion: Any, most: int = MOST_CONFUSIONS) -> list[tuple[int, int, int]]:
    """The most frequent errors of single-label classification, the most frequent first, ties by class.

    Args:
        confusion: as `metrics.confusion` returns it.
        most: number of pairs.

    Returns:
        (true class, predicted class, count) of each pair.
    """
    errors = [(i, j, n) for i, j, n in pairs(confusion) if i != j]
    return sorted(errors, key=lambda pair: (-pair[2], pair[:2]))[:most]


def pairs(confusion: Any) -> list[tuple[int, int, int]]:
    """(true class, predicted class, count) of the pairs that occur; from either form of a confusion matrix."""
    if isinstance(confusion, Mapping):
        return [(i, j, n) for i, j, n in confusion["pairs"]]
    return [(i, j, n) for i, row in enumerate(confusion) for j, n in enumerate(row) if n]


def named(names: Sequence[str], by_class: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`per_class` with the label of each class."""
    return [{"label": names[i], **values} for i, values in enumerate(by_class)]
