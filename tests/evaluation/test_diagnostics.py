"""The numbers of a report's curves, against arithmetic by hand, scikit-learn and the metrics."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import f1_score, precision_score, recall_score

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.diagnostics import Change, coverage, diagnose, reliability


def drawn(examples=300, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=examples)
    logits = rng.normal(size=(examples, classes)).astype(np.float32)
    logits[np.arange(examples), labels] += 1.5
    return logits, labels


def test_reliability_by_hand_and_against_the_calibration_error():
    bins = reliability(np.array([0.01, 0.05, 0.99, 1.0, 0.5]), np.array([0, 1, 1, 1, 0]))
    assert bins["count"] == [2] + [0] * 6 + [1] + [0] * 6 + [2]
    assert bins["accuracy"][0] == 0.5 and bins["accuracy"][7] == 0 and bins["accuracy"][14] == 1
    assert bins["confidence"][14] == pytest.approx(0.995) and bins["accuracy"][3] is None
    logits, labels = drawn()
    bins = diagnose(SINGLE_LABEL, "abcd", logits, labels)["reliability"]
    gaps = [n * abs(p - a) for n, p, a in zip(*bins.values(), strict=True) if n]
    assert sum(gaps) / len(labels) == pytest.approx(scores.single_label(logits, labels)["ece"])


def test_the_change_is_undone():
    """Temperature and offsets as a run applies them, one after the other."""
    logits, labels = drawn()
    offsets = (0.5, -0.5, 0.25, -0.25)
    saved = logits / 2.5 + np.array(offsets)
    found = diagnose(SINGLE_LABEL, "abcd", saved, labels, Change(2.5, offsets))
    before = diagnose(SINGLE_LABEL, "abcd", logits, labels)
    assert found["reliability_before"]["count"] == before["reliability"]["count"] != found["reliability"]["count"]
    assert found["reliability_before"]["accuracy"] == before["reliability"]["accuracy"]
    assert "reliability_before" not in before


def test_coverage_by_hand():
    found = coverage(np.array([0.9, 0.6, 0.6, 0.6, 0.7]), np.array([1, 1, 0, 1, 0]))
    assert found["coverage"] == [0.2, 0.4, 0.6, 0.8, 1.0]
    # Of three equally confident answers, two are right: each counts two thirds.
    assert found["accuracy"] == pytest.approx([1, 1 / 2, (1 + 2 / 3) / 3, (1 + 4 / 3) / 4, 3 / 5])
    assert found["confidence"] == [0.9, 0.7, 0.6, 0.6, 0.6]
    logits, labels = drawn()
    found = diagnose(SINGLE_LABEL, "abcd", logits, labels)["coverage"]
    order = np.argsort(-softmax(logits, axis=1).max(1))
    half = (logits.argmax(1) == labels)[order[: len(labels) // 2]].mean()
    assert found["accuracy"][found["coverage"].index(0.5)] == pytest.approx(half)
    assert found["accuracy"][-1] == pytest.approx((logits.argmax(1) == labels).mean())


def test_thresholds_are_scikit_learns():
    rng = np.random.default_rng(1)
    labels = (rng.random((200, 3)) < [0.2, 0.5, 0.1]).astype(float)
    logits = 2 * labels - 1 + rng.normal(size=(200, 3))
    found = diagnose(MULTI_LABEL, ["a", "b", "c"], logits, labels)["thresholds"]
    for index in (3, 9, 15):
        predicted = 1 / (1 + np.exp(-logits)) > found["threshold"][index]
        assert found["f1_micro"][index] == pytest.approx(f1_score(labels, predicted, average="micro"))
        assert found["f1_macro"][index] == pytest.approx(f1_score(labels, predicted, average="macro"))
        assert found["precision"][index] == pytest.approx(precision_score(labels, predicted, average="micro"))
        assert found["recall"][index] == pytest.approx(recall_score(labels, predicted, average="micro"))
        own = f1_score(labels, predicted, average=None)
        assert [one["f1"][index] for one in found["labels"]] == pytest.approx(own)
    assert [one["label"] for one in found["labels"]] == ["a", "b", "c"]


def test_of_many_labels_those_with_most_positives():
    labels = np.tril(np.ones((60, 60)))[:, ::-1]  # the last label is positive everywhere, the first once
    names = [f"l{i}" for i in range(60)]
    found = diagnose(MULTI_LABEL, names, labels - 0.5, labels)["thresholds"]
    assert [one["label"] for one in found["labels"]] == names[10:]


def test_points_of_a_regression_and_nothing_of_a_diverged_run():
    points = diagnose(REGRESSION, ["x"], np.arange(1200.0)[:, None], np.arange(1200.0) / 2)["points"]
    assert len(points) == 400 and points[1] == [1.5, 3.0]
    logits, labels = drawn()
    logits[3, 1] = np.nan
    assert diagnose(SINGLE_LABEL, "abcd", logits, labels) == {}
