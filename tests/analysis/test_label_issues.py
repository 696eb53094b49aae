"""Labels that look wrong are those that were made wrong, by cleanlab's scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanlab.rank import get_label_quality_scores

from hf_transfer import UserError
from hf_transfer.analysis import label_issues
from hf_transfer.analysis.label_issues import judge, judge_features
from hf_transfer.analysis.out_of_fold import out_of_fold
from tests.analysis.test_out_of_fold import clouds

STRENGTHS = (0.1, 0.01)
WRONG = {3: 0, 17: 1, 40: 2, 41: 0}  # row: the class that is added to the right one, less 1


def flipped(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.tensor(
        [(int(y) + 1 + WRONG[i] % (classes - 1)) % classes if i in WRONG else y for i, y in enumerate(labels)]
    )


class Features:
    """What is read of `FrozenFeatures`."""

    def __init__(self, **matrices: torch.Tensor):
        self.matrices, self.groups, self.asked = matrices, tuple(matrices), list[tuple[str, str | None]]()

    def matrix(self, group: str, pooling: str | None = None) -> torch.Tensor:
        self.asked.append((group, pooling))
        return self.matrices[group]


@pytest.mark.parametrize("classes", [2, 4])
def test_wrong_labels_are_found_and_the_right_ones_suggested(classes):
    x, right = clouds([30] * classes, width=20)
    given = flipped(right, classes)
    found = judge([x], given, seed=1, strengths=STRENGTHS)
    assert {i.row: i.suggested for i in found.issues if i.looks_wrong} == {row: (int(right[row]),) for row in WRONG}
    assert all(i.given == (int(given[i.row]),) and i.score == found.scores[i.row] for i in found.issues)
    order = [(not i.looks_wrong, i.score) for i in found.issues]
    assert order == sorted(order) and all(i.looks_wrong == (i.probability < 0.1) for i in found.issues)
    assert set(np.argsort(found.scores)[: len(WRONG)]) == set(WRONG)
    assert found.left_out == 0 and found.agreement == 1 - len(WRONG) / len(given)
    probabilities = out_of_fold(x, given, seed=1, strengths=STRENGTHS).probabilities
    expected = get_label_quality_scores(
        given.numpy(), probabilities, method="normalized_margin", adjust_pred_probs=True
    )
    np.testing.assert_array_equal(found.scores, expected)
    assert all(i.probability == probabilities[i.row, i.given[0]] for i in found.issues)


def test_a_head_that_knows_little_calls_labels_doubtful_at_most():
    """A cloud apart by half a standard deviation: no label is improbable."""
    x, right = clouds([60, 60], width=3)
    x = x / 10 + torch.randn(120, 3, generator=torch.Generator().manual_seed(1))
    found = judge([x], flipped(right, 2))
    assert found.issues and not any(i.looks_wrong for i in found.issues)
    assert all(0.1 <= i.probability < 0.5 for i in found.issues)


def test_right_labels_are_left_alone():
    x, right = clouds([30, 30, 30], width=20)
    assert judge([x], right, strengths=STRENGTHS).issues == ()


def test_a_class_with_one_example_cannot_be_judged():
    x, right = clouds([20, 1, 30, 1], width=20)
    found = judge([x], right, strengths=STRENGTHS)
    alone = np.flatnonzero(np.isin(right, [1, 3]))
    assert found.left_out == 2 and found.classes_left_out == 2
    assert set(np.flatnonzero(np.isnan(found.scores))) == set(alone)
    wrong = right.clone()
    wrong[right.tolist().index(2)] = 0
    (issue,) = judge([x], wrong, strengths=STRENGTHS).issues
    assert (issue.given, issue.suggested) == ((0,), (2,)), "numbers of the classes, with those left out"


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0, 1, 2, 3]])
def test_nothing_to_compare_with(labels):
    with pytest.raises(UserError, match="two classes have at least two examples"):
        judge([torch.randn(4, 3)], torch.tensor(labels))
    with pytest.raises(UserError, match="two classes have at least two examples"):
        judge([torch.randn(4, 2)], torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1]), 2).float()[:, 1:])


def test_several_labels():
    """Two labels that are independent of each other; a third that only one example has is never judged."""
    g = torch.Generator().manual_seed(0)
    right = torch.zeros(120, 3)
    right[:, :2] = (torch.rand(120, 2, generator=g) < 0.5).float()
    x = torch.randn(120, 20, generator=g)
    x[:, :2] += 10 * right[:, :2]
    right[5, 2] = 1
    given = right.clone()
    given[7, 0], given[5, 1] = 1 - given[7, 0], 1 - given[5, 1]
    found = judge([x], given)
    assert found.classes_left_out == 1 and found.left_out == 0
    suggested = {i.row: set(i.suggested) for i in found.issues if i.looks_wrong}
    assert suggested == {row: set(right[row].nonzero()[:, 0].tolist()) for row in (5, 7)}
    assert set(np.argsort(found.scores)[:2]) == {5, 7}


def test_the_layers_that_predict_best_are_read():
    x, right = clouds([40, 40], width=20)
    noise = torch.randn(80, 20, generator=torch.Generator().manual_seed(1))
    features = Features(stem=noise, middle=x, last=x + noise, head=noise)
    found, layers = judge_features(features, flipped(right, 2))
    assert set(layers) == {"middle", "last"} and set(WRONG) <= {i.row for i in found.issues}
    assert set(features.asked) == {("stem", "mean"), ("middle", "mean"), ("last", "mean"), ("head", None)}
    assert judge_features(Features(stem=noise, last=noise, head=x), right)[1][0] == "head"


def test_the_probabilities_of_layers_are_averaged():
    x, right = clouds([20, 20])
    other = x + torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    keys = dict(strengths=STRENGTHS, seed=3)
    mean = np.mean([out_of_fold(one, right, **keys).probabilities for one in (x, other)], axis=0)
    expected = get_label_quality_scores(right.numpy(), mean, method="normalized_margin", adjust_pred_probs=True)
    np.testing.assert_array_equal(judge([x, other], right, **keys).scores, expected)


def test_of_many_layers_some_are_tried_and_the_last_always(monkeypatch):
    x, right = clouds([10, 10])
    features = Features(**{f"layer.{i}": x for i in range(24)}, head=x)
    judge_features(features, right)
    tried = list(dict.fromkeys(group for group, _ in features.asked))
    assert len(tried) == 9 and tried[0] == "layer.0" and tried[-2:] == ["layer.23", "head"]


def test_a_layer_is_chosen_with_a_sample_of_every_class(monkeypatch):
    x, right = clouds([200, 4, 3])
    seen = []

    def watched(features, labels, **keys):
        seen.append(labels)
        return out_of_fold(features, labels, **keys)

    monkeypatch.setattr(label_issues, "_SAMPLE", 20)
    monkeypatch.setattr(label_issues, "out_of_fold", watched)
    judge_features(Features(last=x), right)
    assert [len(labels) for labels in seen] == [20, 207]
    assert seen[0].bincount().tolist() == [13, 4, 3]
