"""Metrics against scikit-learn, intervals against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import disable_progress_bars
from scipy.special import softmax
from sklearn import metrics as sk

from hf_transfer.evaluation import metrics

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
    assert set(ours) == set(theirs) - {"ece", "top_5_accuracy"}
    assert {k: float(v) for k, v in ours.items()} == pytest.approx({k: theirs[k] for k in ours}, abs=1e-12)


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


# ---- as evaluate's metrics -----------------------------------------------------------------------------------------


def test_they_are_metrics_of_evaluate_with_the_same_numbers(monkeypatch):
    """Without a network: `evaluate.load` would ask a hub. Also in batches, and combined."""
    import socket

    import evaluate

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("asks a network"))
    disable_progress_bars()
    rng = np.random.default_rng(0)
    cases = {
        SINGLE: (rng.normal(size=(40, 7)).astype(np.float32), rng.integers(0, 7, 40)),
        "multi_label_classification": (rng.normal(size=(40, 3)), rng.integers(0, 2, (40, 3)).astype(float)),
        "regression": (rng.normal(size=40), rng.normal(size=40)),
    }
    for kind, (logits, labels) in cases.items():
        metric = metrics.METRICS[kind]()
        assert isinstance(metric, evaluate.Metric)
        expected = metrics.compute(kind, logits, labels)
        assert metric.compute(predictions=logits, references=labels) == expected
        for part in range(0, 40, 8):
            metric.add_batch(predictions=logits[part : part + 8], references=labels[part : part + 8])
        assert metric.compute() == expected
        assert set(metrics.names(kind, 7 if kind == SINGLE else 3)) == set(expected)
    both = evaluate.combine([metrics.RegressionMetrics()])
    assert both.compute(predictions=[1.0, 2.0], references=[1.0, 3.0])["mae"] == 0.5


def test_calibration_error_against_its_definition():
    """Guo et al. 2017, equation 3, bin by bin; and what is known in advance."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 4)) * 2, rng.integers(0, 4, 200)
    p = softmax(logits, -1)
    confidence, right = p.max(-1), p.argmax(-1) == labels
    total = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.compute(SINGLE, logits, labels)["ece"] == pytest.approx(total, abs=1e-12)
    certain = np.array([[50.0, 0], [50, 0], [50, 0], [50, 0]])
    assert metrics.compute(SINGLE, certain, np.array([0, 0, 0, 1]))["ece"] == pytest.approx(0.25)
    low, high = metrics.intervals(SINGLE, logits, labels)["ece"]
    assert low < total * 1.5 and low < high


def test_top_five_against_scikit_learn():
    """Only with more than five classes; ties as argmax breaks them."""
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(300, 10)), rng.integers(0, 10, 300)
    scores = metrics.compute(SINGLE, logits, labels)
    assert scores["top_5_accuracy"] == pytest.approx(sk.top_k_accuracy_score(labels, logits, k=5))
    low, high = metrics.intervals(SINGLE, logits, labels)["top_5_accuracy"]
    assert low < scores["top_5_accuracy"] < high
    assert "top_5_accuracy" not in metrics.compute(SINGLE, logits[:, :5], labels % 5)
    tied = np.zeros((10, 10))
    assert metrics.compute(SINGLE, tied, np.arange(10))["top_5_accuracy"] == 0.5


def test_a_run_that_diverged_has_metrics_too():
    """NaN where there is no number; nothing raises, so that `results.json` is written and says so."""
    nan = np.full((4, 3), np.nan)
    assert "accuracy" in metrics.compute(SINGLE, nan, np.array([0, 1, 2, 0]))
    assert "f1_macro" in metrics.compute("multi_label_classification", nan, np.eye(4, 3))
    assert np.isnan(metrics.compute("regression", nan[:, :1], np.arange(4.0))["rmse"])
