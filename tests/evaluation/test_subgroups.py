"""Metrics of parts of the examples and of classes, against those parts alone and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_transfer import UserError
from hf_transfer.evaluation import by_class, metrics
from hf_transfer.evaluation.diagnostics import calibration_of
from hf_transfer.evaluation.subgroups import check_column, groups_of, measure_groups
from hf_transfer.evaluation.tables import format_calibration, format_classes, format_groups

SINGLE, MULTI, VALUE = "single_label_classification", "multi_label_classification", "regression"


def test_a_group_is_measured_as_if_it_were_alone():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 90), rng.normal(size=(90, 3))
    values = [("b", "a", None, float("nan"), "b", "c")[i % 6] for i in range(90)]
    groups = groups_of("origin", values)
    assert list(groups) == ["a", "b", "c", None] and [len(rows) for rows in groups.values()] == [15, 30, 15, 30]
    found = list(measure_groups(SINGLE, logits, labels, groups))
    for one in found:
        rows = [i for i, v in enumerate(values) if (v if isinstance(v, str) else None) == one["value"]]
        assert one["num_examples"] == len(rows)
        assert one["metrics"]["accuracy"] == sk.accuracy_score(labels[rows], logits[rows].argmax(-1))
        assert one["metrics"] == metrics.compute(SINGLE, logits[rows], labels[rows])
        assert one["intervals"] == metrics.intervals(SINGLE, logits[rows], labels[rows])
    lines = list(format_groups("origin", found, SINGLE))
    assert lines[0] == "By origin:" and lines[-1].split()[:2] == ["(missing)", "30"]
    assert list(groups_of("n", [10, 9, True, 2.5, None])) == [1, 2.5, 9, 10, None]


def test_columns_that_make_no_groups():
    with pytest.raises(UserError, match=r"column 'id' has 5,000 different values; 50 at most") as caught:
        groups_of("id", range(5000))
    assert caught.value.key == "by"
    with pytest.raises(UserError, match="column 'tags' contains lists"):
        groups_of("tags", [["a"]])
    with pytest.raises(UserError, match=r"no column 'gendr'.*Did you mean 'gender'"):
        check_column("gendr", ["text", "gender"])


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_classes_equal_scikit_learns_and_intervals_hold_them(kind):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(400, 4))
    labels = rng.integers(0, 3, 400) if kind == SINGLE else (rng.random((400, 4)) < [0.5, 0.3, 0.1, 0.0]).astype(int)
    logits[:, 3] -= 50  # neither an example nor a prediction
    predicted = logits.argmax(-1) if kind == SINGLE else (logits > 0).astype(int)
    found = by_class.with_intervals(kind, "abcd", logits, labels)
    theirs = sk.precision_recall_fscore_support(labels, predicted, labels=range(4), zero_division=np.nan)
    for i, one in enumerate(found[:3]):
        assert (one["precision"], one["recall"], one["f1"]) == pytest.approx(tuple(t[i] for t in theirs[:3]))
        assert one["label"] == "abcd"[i] and one["support"] == theirs[3][i]
        for name, (low, high) in one["intervals"].items():
            assert low < one[name] < high
    assert found[3]["f1"] is None and found[3]["intervals"] == {}
    if kind == SINGLE:  # the bootstrap over examples, drawn one by one
        drawn = [
            sk.f1_score(labels[i], predicted[i], labels=[1], average="macro") for i in rng.integers(0, 400, (500, 400))
        ]
        assert found[1]["intervals"]["f1"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    lines = list(format_classes(found))
    assert len(lines) == 6 and lines[-1].split() == ["d", "0", "–", "–", "–"]
    many = by_class.with_intervals(SINGLE, [f"c{i}" for i in range(60)], np.eye(60)[[1, *range(1, 60)]], np.arange(60))
    shown = list(format_classes(many))
    assert "The 20 of 60 classes with the lowest F1" in shown[0] and shown[2].split()[0] == "c0" and len(shown) == 22
    assert by_class.with_intervals(VALUE, ["x"], logits[:, :1], logits[:, 0]) == [] == list(format_classes([]))


def test_calibration_says_how_sure_and_how_right():
    logits, labels = np.log([[0.9, 0.1]] * 10), np.array([0] * 6 + [1] * 4)
    found = calibration_of(SINGLE, logits, labels)
    assert (found["ece"], found["confidence"], found["accuracy"]) == pytest.approx((0.3, 0.9, 0.6))
    assert found["ece"] == metrics.compute(SINGLE, logits, labels)["ece"]
    assert found["reliability"]["count"][13] == 10 and sum(found["reliability"]["count"]) == 10
    assert "overconfident by 0.3000" in next(format_calibration(found))
    several = calibration_of(MULTI, np.full((10, 2), np.log(0.2 / 0.8)), np.array([[0, 1]] * 4 + [[0, 0]] * 6))
    assert (several["ece"], several["confidence"], several["accuracy"]) == pytest.approx((0.0, 0.2, 0.2))
    assert calibration_of(VALUE, logits[:, :1], labels) == {} == calibration_of(SINGLE, logits * np.nan, labels)
