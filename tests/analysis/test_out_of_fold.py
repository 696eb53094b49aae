"""Probabilities of examples by heads that have not seen them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_transfer.analysis.out_of_fold import out_of_fold
from hf_transfer.features.convex_head import SINGLE
from hf_transfer.features.cross_validation import divisions


def clouds(counts, width=5, seed=0):
    """(features, labels): for each class a cloud of so many examples, in random order."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.tensor([c for c, count in enumerate(counts) for _ in range(count)])
    labels = labels[torch.randperm(len(labels), generator=g)]
    centers = 2 * torch.randn(len(counts), width, generator=g)
    return centers[labels] + torch.randn(len(labels), width, generator=g), labels


def test_probabilities_are_those_of_the_other_folds_heads():
    """Against scikit-learn, fold by fold, scaled by all: C = 1 / (examples × strength) is the same penalty."""
    x, y = clouds([15, 20, 25])
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    found = out_of_fold(x, y, repeats=2, strengths=[0.1], seed=7)
    expected = np.zeros((60, 3))
    for draw in divisions(SINGLE, y, 2, seed=7):
        for fold in range(5):
            rest, held = draw != fold, draw == fold
            head = LogisticRegression(C=1 / (0.1 * rest.sum()), tol=1e-10, max_iter=1000)
            head.fit(scaled[rest], y[rest])
            expected[held] += head.predict_proba(scaled[held]) / 2
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-3)
    assert found.l2 == 0.1


def test_the_strength_has_the_least_held_out_loss():
    x, y = clouds([30, 30], width=40)
    x = x + 6 * torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    strengths = [100.0, 10.0, 1.0, 0.1, 0.01]
    each = {s: out_of_fold(x, y, repeats=1, strengths=[s]).loss for s in strengths}
    found = out_of_fold(x, y, repeats=1, strengths=strengths)
    assert found.l2 == min(each, key=each.__getitem__) not in (100.0, 0.01)
    assert found.loss == pytest.approx(min(each.values()), rel=1e-3)


def test_two_examples_of_each_class_are_enough():
    x, y = clouds([2, 2])
    found = out_of_fold(x, y)
    assert found.probabilities.shape == (4, 2) and np.allclose(found.probabilities.sum(1), 1)
