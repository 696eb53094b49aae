"""Classes, confusions and the baseline: equal to scikit-learn's where it has them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_transfer.evaluation import by_class, metrics, standing

SINGLE, MULTI, VALUE = "single_label_classification", "multi_label_classification", "regression"


@pytest.mark.parametrize("classes", [2, 5, 130])
def test_classes_are_scikit_learns(classes):
    rng = np.random.default_rng(classes)
    labels, logits = rng.integers(0, classes, 200), rng.normal(size=(200, classes))
    logits[:, -1] -= 50  # never predicted
    labels[labels == 0] = 1  # no examples
    found = by_class.per_class(SINGLE, logits, labels)
    precision, recall, _, support = sk.precision_recall_fscore_support(
        labels, logits.argmax(-1), labels=np.arange(classes), zero_division=np.nan
    )
    assert [c["support"] for c in found] == support.tolist()
    assert found[-1]["precision"] is None and found[0]["recall"] is None
    for ours, theirs in (("precision", precision), ("recall", recall)):
        values = [np.nan if c[ours] is None else c[ours] for c in found]
        assert values == pytest.approx(theirs.tolist(), nan_ok=True)
    table = sk.confusion_matrix(labels, logits.argmax(-1), labels=np.arange(classes))
    np.fill_diagonal(table, 0)
    pairs = by_class.most_confused(metrics.confusion(SINGLE, logits, labels), 4)
    assert [n for *_, n in pairs] == sorted(table[table > 0], reverse=True)[:4]
    assert all(table[i, j] == n for i, j, n in pairs)


def test_several_labels_have_their_own_thresholds():
    logits, labels = np.array([[1.0, 1], [-1, -1], [1, 1]]), np.array([[1, 0], [0, 1], [1, 1]])
    assert by_class.per_class(MULTI, logits, labels) == [
        {"precision": 1.0, "recall": 1.0, "support": 2},
        {"precision": 0.5, "recall": 0.5, "support": 2},
    ]
    none = by_class.per_class(MULTI, logits, labels, np.array([5.0, 0.0]))[0]
    assert none == {"precision": None, "recall": 0.0, "support": 2}
    assert by_class.per_class(VALUE, logits[:, :1], labels[:, 0]) == []
    assert by_class.most_confused([[3, 0], [0, 2]]) == []


def test_the_interval_decides_against_the_baseline():
    constant = {"accuracy": 0.7, "rmse": 2.0}
    for low, high, expected in ((0.71, 0.9, "better"), (0.6, 0.8, "not significantly better"), (0.5, 0.69, "worse")):
        assert standing.verdict("accuracy", constant, {"accuracy": [low, high]}) == expected
    for low, high, expected in ((1.0, 1.9, "better"), (1.5, 2.5, "not significantly better"), (2.1, 3.0, "worse")):
        assert standing.verdict("rmse", constant, {"rmse": [low, high]}) == expected
    assert standing.verdict("rmse", constant, {"rmse": [np.nan, np.nan]}) == "not significantly better"
    assert standing.verdict("map", constant, {"map": [0.0, 1.0]}) is None


def test_what_the_baseline_answers():
    train, held_out = np.array([0, 2, 2]), np.array([2, 1])
    one = standing.against_baseline(SINGLE, "abc", train, held_out, {}, {"accuracy": [0.6, 0.9]})
    assert (one["predicts"], one["metrics"]["accuracy"], one["verdict"]) == ("c", 0.5, "better")
    several = standing.against_baseline(MULTI, "ab", np.array([[1, 0], [1, 0]]), np.array([[1, 1]]), {}, {})
    assert (several["predicts"], several["compared_by"], several["verdict"]) == (["a"], "f1_micro", None)
    value = standing.against_baseline(VALUE, "a", np.array([1.0, 3]), np.array([2.0, 4]), {}, {"rmse": [0.1, 0.2]})
    assert value["predicts"] == 2.0 and value["metrics"]["rmse"] == pytest.approx(2**0.5)
