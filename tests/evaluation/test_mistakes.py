"""Wrong answers and confusion frames, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pandas
import pytest

from hf_transfer.evaluation.curves import draw_curves
from hf_transfer.evaluation.metrics import confusion
from hf_transfer.evaluation.mistakes import confusion_frame, mistakes

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def test_wrong_classes_the_worst_first():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1]]))
    found = mistakes(SINGLE, logits, np.array([0, 0, 1, 2]), ["a", "b", "c"])
    assert found["position"] == [1, 2, 3] and found["true"] == ["a", "b", "c"]
    assert found["predicted"] == ["c", "a", "b"] and found["probability"] == pytest.approx([0.6, 0.5, 0.7])
    assert found["loss"] == pytest.approx([-np.log(0.1)] * 3)


def test_wrong_sets_of_labels():
    logits = np.array([[2.0, -1.0], [3.0, 1.0], [-2.0, 0.5]])
    labels = np.array([[1, 0], [0, 1], [1, 1]])
    found = mistakes(SEVERAL, logits, labels, ["a", "b"])
    assert (
        found["position"] == [1, 2]
        and found["true"] == [["b"], ["a", "b"]]
        and found["predicted"] == [["a", "b"], ["b"]]
    )
    assert found["probability"] == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-2))])
    assert found["loss"][0] == pytest.approx((np.log1p(np.exp(3)) + np.log1p(np.exp(-1))) / 2)
    assert mistakes(SEVERAL, logits, labels, ["a", "b"], thresholds=[0.1, 0.7])["position"] == [1, 2]
    assert mistakes(SEVERAL, logits, labels, ["a", "b"], thresholds=[0.1, 0.5])["predicted"] == [["a", "b"]]


def test_numbers_by_their_error():
    found = mistakes(NUMBER, np.array([[1.0], [2.0], [5.0]]), np.array([1.5, 2.0, 3.0]), ["y"])
    assert found == {
        "position": [2, 0, 1],
        "true": [3.0, 1.5, 2.0],
        "predicted": [5.0, 1.0, 2.0],
        "loss": [4.0, 0.25, 0.0],
    }


@pytest.mark.parametrize("classes", [3, 120])
def test_a_confusion_frame(classes):
    """Also of the counts of many classes, which are pairs."""
    names = [f"c{i}" for i in range(classes)]
    logits, labels = np.eye(classes)[[1, 1, 0, 2]], np.array([0, 1, 0, 0])
    frame = confusion_frame(confusion(SINGLE, logits, labels), names)
    assert frame.shape == (classes, classes) and frame.index.name == "true" and frame.columns.name == "predicted"
    assert frame.loc["c0", ["c0", "c1", "c2"]].tolist() == [1, 1, 1] and frame.loc["c1", "c1"] == 1
    assert frame.to_numpy().sum() == 4


def test_curves():
    no = [None, None]
    columns = {"loss": [1.0, 0.5, None], "eval_loss": [*no, 0.7], "eval_accuracy": [*no, 0.5]}
    history = pandas.DataFrame({"step": [1, 2, 2], **columns})
    losses, scores = draw_curves(history).axes
    assert [line.get_xydata().tolist() for line in losses.lines] == [[[1, 1.0], [2, 0.5]], [[2, 0.7]]]
    assert [line.get_label() for line in scores.lines] == ["accuracy"]
