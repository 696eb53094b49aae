"""Confident learning of one label per example (Northcutt et al. 2021, "Confident learning: estimating uncertainty in
dataset labels"): how well each label fits its example, and how many labels are wrong.

Both start from the confidence in a class: the mean probability of the class over the examples that are labeled with it.
The numbers are those of cleanlab, which tests compare with. It is not imported for them: with scikit-learn it takes 0.7
s of CPU time to import, more than all the rest of judging the labels of some hundred examples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_LEAST = 2e-6  # confidence in a class
_SLACK = 1e-6  # by which a probability may miss a confidence, or another probability, and still count as equal


def confidences(labels: Array, probabilities: Array) -> Array:
    """(classes,) confidence in each class, all of which occur.

    Args:
        labels: (examples,) classes.
        probabilities: (examples, classes).
    """
    own = probabilities[np.arange(len(labels)), labels]
    return np.maximum([own[labels == each].mean() for each in range(probabilities.shape[1])], _LEAST)


def margins(labels: Array, probabilities: Array) -> Array:
    """(examples,) scores from 0 to 1: how far the label's probability is above the highest other one.

    Each is taken less the confidence in its class, and the sum is one again.

    Args:
        labels: (examples,) classes.
        probabilities: (examples, classes).
    """
    confidence = confidences(labels, probabilities)
    adjusted = probabilities - confidence + confidence.max()
    adjusted /= adjusted.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    own = adjusted[rows, labels]
    adjusted[rows, labels] = -np.inf
    return (own - adjusted.max(1) + 1) / 2


def number_wrong(labels: Array, probabilities: Array) -> int:
    """How many labels are wrong: those of examples that confidently belong to another class.

    An example confidently belongs to the class whose confidence its probability reaches; if there are several, to the
    most probable of all. A label that is as probable as any other is not counted.

    Args:
        labels: (examples,) classes.
        probabilities: (examples, classes).
    """
    reaches = probabilities >= confidences(labels, probabilities) - _SLACK
    likeliest = probabilities.argmax(1)
    belongs = np.where(reaches.sum(1) > 1, likeliest, reaches.argmax(1))
    own = probabilities[np.arange(len(labels)), labels]
    favored = probabilities.copy()
    favored[np.arange(len(labels)), labels] = own + _SLACK
    return int((reaches.any(1) & (belongs != labels) & (favored.argmax(1) != labels)).sum())
