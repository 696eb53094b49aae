"""Confident learning against cleanlab."""

from __future__ import annotations

import numpy as np
import pytest
from cleanlab.count import num_label_issues
from cleanlab.rank import get_label_quality_scores

from hf_transfer.analysis.confident_learning import confidences, margins, number_wrong


def drawn(classes, examples, sharpness, seed):
    """(labels, probabilities) where one label in five is drawn again; every class occurs."""
    chance = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), chance.integers(0, classes, examples - classes)])
    logits = sharpness * (np.eye(classes)[truth] + chance.normal(size=(examples, classes)) / 2)
    labels = np.where(chance.random(examples) < 0.2, chance.integers(0, classes, examples), truth)
    labels[:classes] = np.arange(classes)
    probabilities = np.exp(logits)
    return labels, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 3.0, 200.0], ids=["equal", "flat", "usual", "certain"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_scores_and_numbers_are_those_of_cleanlab(classes, sharpness):
    """Bit for bit; also of probabilities that are equal, 0 or 1."""
    numbers = []
    for seed in range(5):
        labels, probabilities = drawn(classes, 90, sharpness, seed)
        expected = get_label_quality_scores(labels, probabilities, method="normalized_margin", adjust_pred_probs=True)
        np.testing.assert_array_equal(margins(labels, probabilities), expected)
        numbers.append(number_wrong(labels, probabilities))
        assert numbers[-1] == num_label_issues(labels, probabilities)
    assert (max(numbers) > 0) == (sharpness > 0)


def test_confidence_is_the_mean_probability_of_the_class_where_it_is_given():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.0, 1.0], [1.0, 0.0]])
    np.testing.assert_array_equal(confidences(np.array([0, 0, 1, 1]), probabilities), [0.75, 0.5])
    assert number_wrong(np.array([0, 0, 1, 1]), probabilities) == 1
