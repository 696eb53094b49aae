"""What a classifier gets right and wrong, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.evaluation import scores
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
    if problem_type == REGRESSION:
        return []
    if problem_type == MULTI_LABEL:
        counts = scores.label_counts(logits, labels, limits)
    else:
        counts = scores.class_counts(labels, logits.argmax(-1), logits.shape[-1])
    return [
        {
            "precision": hits / predicted if predicted else None,
            "recall": hits / true if true else None,
            "support": true,
        }
        for hits, true, predicted in zip(*(c.tolist()[: logits.shape[-1]] for c in counts), strict=True)
    ]


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
