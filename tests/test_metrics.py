"""Metrics against scikit-learn, intervals against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_transfer import metrics

SINGLE = "single_label_classification"


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_confusion_metrics_equal_scikit_learns(classes):
    """Also where a class never occurs, or is never predicted."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, max(classes - 1, 2), 300)
    logits = rng.normal(size=(300, classes))
    logits[:, -1] -= 9 if classes == 3 else 0
    table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(classes))
    theirs, ours = metrics.compute(SINGLE, logits, labels), metrics.from_confusion(table)
    assert set(theirs) == set(ours)
    assert {k: float(v) for k, v in ours.items()} == pytest.approx(theirs, abs=1e-12)


def test_an_interval_has_its_coverage():
    """Close to the normal one for an accuracy of 0.8; the macro recall of two even classes is nearly the same."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    right = rng.random(400) < 0.8
    logits = np.eye(2)[np.where(right, labels, 1 - labels)]
    low, high = metrics.intervals(SINGLE, logits, labels)["accuracy"]
    accuracy, width = right.mean(), 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert low == pytest.approx(accuracy - width, abs=0.012) and high == pytest.approx(accuracy + width, abs=0.012)
    low, high = metrics.intervals(SINGLE, logits, labels)["recall_macro"]
    assert low == pytest.approx(accuracy - width, abs=0.015) and high == pytest.approx(accuracy + width, abs=0.015)


def test_a_faultless_test_is_not_certain():
    low, high = metrics.intervals(SINGLE, np.eye(2)[[0, 1] * 180], np.array([0, 1] * 180))["accuracy"]
    assert low == pytest.approx(360 / (360 + 1.96**2), abs=1e-4) and high == 1.0


def test_multi_label_and_regression():
    labels = np.array([[1, 0], [0, 1], [1, 1]], float)
    logits = np.array([[2.0, -1], [-1, 3], [1, -2]])
    scores = metrics.compute("multi_label_classification", logits, labels)
    assert scores["f1_micro"] == pytest.approx(6 / 7) and scores["accuracy"] == pytest.approx(2 / 3)
    values = metrics.compute("regression", np.array([[1.0], [2], [4]]), np.array([1.0, 2, 3]))
    assert values["mae"] == pytest.approx(1 / 3) and values["rmse"] == pytest.approx(np.sqrt(1 / 3))
    assert values["spearman"] == pytest.approx(1) and values["pearson"] == pytest.approx(0.98198, abs=1e-4)
    assert "pearson" not in metrics.compute("regression", np.ones((3, 1)), np.array([1.0, 2, 3]))
    for kind, z, y in (("multi_label_classification", logits, labels), ("regression", values_of(30), values_of(30, 1))):
        assert all(low <= high for low, high in metrics.intervals(kind, z, y).values())


def values_of(size, seed=0):
    return np.random.default_rng(seed).normal(size=size)
