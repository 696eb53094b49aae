"""Metrics against scikit-learn, intervals against their definition."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from datasets import disable_progress_bars
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn import metrics as sk
from transformers import EvalPrediction

from hf_transfer.evaluation import evaluate_metrics, metric_table, metrics
from hf_transfer.evaluation.measure import metrics_of
from hf_transfer.evaluation.scores import from_counts

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_confusion_metrics_equal_scikit_learns(classes):
    """Also where a class never occurs, or is never predicted."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, max(classes - 1, 2), 300)
    logits = rng.normal(size=(300, classes))
    logits[:, -1] -= 9 if classes == 3 else 0
    predicted, ours, macro = logits.argmax(-1), metrics.compute(SINGLE, logits, labels), {"average": "macro"}
    theirs = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "f1_macro": sk.f1_score(labels, predicted, **macro),
        "precision_macro": sk.precision_score(labels, predicted, zero_division=0, **macro),
        "recall_macro": sk.recall_score(labels, predicted, zero_division=0, **macro),
        "mcc": sk.matthews_corrcoef(labels, predicted),
    }
    assert set(ours) - {"ece", "top_5_accuracy"} == set(theirs)
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("limits", [0.0, np.array([-0.5, 0.0, 0.3, 2.0])], ids=["one-half", "tuned"])
def test_multi_label_metrics_equal_scikit_learns(limits):
    """Also with tied logits, a label that never occurs, and one that is always predicted."""
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 4)) < [0.5, 0.1, 0.0, 0.9]).astype(np.float32)
    logits = (rng.normal(size=(80, 4)) + labels + [0, 0, 0, 5]).round(1).astype(np.float32)
    ours, predicted = metrics.compute(MULTI, logits, labels, limits), (logits > limits).astype(int)
    assert ours == pytest.approx(
        {
            "f1_macro": sk.f1_score(labels, predicted, average="macro", zero_division=0),
            "f1_micro": sk.f1_score(labels, predicted, average="micro"),
            "accuracy": sk.accuracy_score(labels, predicted),
            "map": sk.average_precision_score(labels[:, [0, 1, 3]], logits[:, [0, 1, 3]], average="macro"),
        },
        abs=1e-12,
    )
    one = metrics.compute(MULTI, logits[:, :1], labels[:, :1])
    assert one["f1_macro"] == one["f1_micro"] == pytest.approx(sk.f1_score(labels[:, 0], logits[:, 0] > 0))


@pytest.mark.parametrize(("kind", "outputs"), [(SINGLE, 8), (MULTI, 3), ("regression", 1)])
def test_each_metric_is_in_the_table_with_its_direction(kind, outputs):
    """Perfect predictions score better than random ones."""
    rng = np.random.default_rng(0)
    labels = {
        SINGLE: rng.integers(0, outputs, 60),
        MULTI: rng.integers(0, 2, (60, outputs)).astype(float),
        "regression": rng.normal(size=60),
    }[kind]
    perfect = {SINGLE: lambda: 50 * np.eye(outputs)[labels], MULTI: lambda: labels - 0.5}.get(kind, lambda: labels)()
    best, random = metrics.compute(kind, perfect, labels), metrics.compute(kind, rng.normal(size=perfect.shape), labels)
    assert set(best) == set(metric_table.names(kind, outputs))
    for name in best:
        assert (best[name] > random[name]) == metric_table.greater_is_better(f"eval_{name}"), name
    assert metric_table.greater_is_better("loss") is False and metric_table.greater_is_better("quality") is None
    assert "top_5_accuracy" not in metric_table.names(SINGLE, 5)


# ---- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "lift"), [(2, 0), (3, 2), (7, 1), (40, 0)])
def test_intervals_are_those_of_resampled_confusion_matrices(classes, lift):
    """The same draws as a multinomial over all cells of the matrix, also if the last cell is empty."""
    rng = np.random.default_rng(classes)
    labels, logits = rng.integers(0, classes, 150), rng.normal(size=(150, classes))
    logits[np.arange(150), labels] += lift
    for last in (0, -50):
        logits[:, -1] += last
        table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(classes))
        draws = np.random.default_rng(5).multinomial(150, table.ravel() / 150, 1000).reshape(1000, classes, classes)
        counts = (np.diagonal(draws, axis1=1, axis2=2), draws.sum(-1), draws.sum(-2))
        found = metrics.intervals(SINGLE, logits, labels, seed=5)
        for name, values in from_counts(*map(np.ascontiguousarray, counts)).items():
            if name != "accuracy":
                assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-12), name


def test_intervals_of_several_labels_are_those_of_resampled_examples():
    rng = np.random.default_rng(0)
    labels = (rng.random((50, 3)) < [0.5, 0.1, 0.02]).astype(float)
    labels[7, 2] = 1
    logits = (rng.normal(size=(50, 3)) + labels).round(1)
    drawn = np.random.default_rng(2).integers(0, 50, (200, 50))
    scores = [metrics.compute(MULTI, logits[i], labels[i]) for i in drawn]
    found = metrics.intervals(MULTI, logits, labels, seed=2)
    assert set(found) == set(scores[0])
    for name, bounds in found.items():
        assert bounds == pytest.approx(np.percentile([s[name] for s in scores], [2.5, 97.5]), abs=1e-12), name
    shifted = metrics.intervals(MULTI, logits - 0.25, labels, seed=2)
    assert metrics.intervals(MULTI, logits, labels, seed=2, limits=0.25) == shifted


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_memory_grows_with_the_classes_not_with_their_pairs(kind):
    """A thousand resampled matrices of 1,000 classes would be 8 GB."""
    rng = np.random.default_rng(0)
    count = 2000 if kind == SINGLE else 400
    logits = rng.normal(size=(count, 1000)).astype(np.float32)
    labels = rng.integers(0, 1000, count)
    if kind == MULTI:
        labels = np.eye(1000, dtype=bool)[labels]
    tracemalloc.start()
    metrics.compute(kind, logits, labels)
    metrics.intervals(kind, logits, labels)
    metrics.confusion(kind, logits, labels)
    metrics.baseline(kind, labels, labels, 1000)
    metrics.best_thresholds(logits[:, :9], labels[:, :9]) if kind == MULTI else None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_many_classes_have_pairs_instead_of_a_matrix():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 101, 300), rng.normal(size=(300, 101))
    pairs = metrics.confusion(SINGLE, logits, labels)["pairs"]
    table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(101))
    assert pairs == [[i, j, table[i, j]] for i, j in np.argwhere(table)]
    assert np.shape(metrics.confusion(SINGLE, logits[:, :100], labels % 100)) == (100, 100)


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
        metric = evaluate_metrics.METRICS[kind]()
        assert isinstance(metric, evaluate.Metric)
        expected = metrics.compute(kind, logits, labels)
        assert metric.compute(predictions=logits, references=labels) == expected
        for part in range(0, 40, 8):
            metric.add_batch(predictions=logits[part : part + 8], references=labels[part : part + 8])
        assert metric.compute() == expected
        assert set(metrics.names(kind, 7 if kind == SINGLE else 3)) == set(expected)
    both = evaluate.combine([evaluate_metrics.RegressionMetrics()])
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


def test_a_metric_that_decides_is_always_there():
    """A correlation of constant predictions is undefined; Trainer ends a run whose metric is missing once."""
    constant = EvalPrediction(np.ones((3, 1)), np.array([1.0, 2, 3]))
    assert "pearson" not in metrics_of("regression", constant)
    assert np.isnan(metrics_of("regression", constant, "eval_pearson")["pearson"])
    assert metrics_of("regression", constant, "loss") == metrics_of("regression", constant, "mine")
    assert metrics_of("regression", constant, "mae")["mae"] == 1.0


@pytest.mark.parametrize("count", [1, 7, 400])
def test_the_interval_of_an_accuracy_is_wilsons(count):
    """Against scipy, at its ends too."""
    for hits in {0, 1, count // 3, count}:
        labels = np.zeros(count, dtype=int)
        logits = np.stack([np.arange(count) < hits, np.full(count, 0.5)], 1).astype(float)
        low, high = metrics.intervals(SINGLE, logits, labels)["accuracy"]
        expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
