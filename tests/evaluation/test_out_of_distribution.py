"""Out-of-distribution scores and what they tell apart, against their definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation.out_of_distribution import Reference, classes_of, energy, scores_of, separation

SINGLE, MULTI, VALUE = "single_label_classification", "multi_label_classification", "regression"


def test_energies():
    logits = np.random.default_rng(0).normal(size=(50, 4)) * 3
    assert energy(SINGLE, logits) == pytest.approx(-np.log(np.exp(logits).sum(-1)))
    assert energy(MULTI, logits) == pytest.approx(-np.log1p(np.exp(logits)).sum(-1))
    assert energy(VALUE, logits[:, :1]) is None and np.isfinite(energy(SINGLE, logits * 1e4)).all()
    assert scores_of(VALUE, logits[:, :1], None, None) == {}
    with pytest.raises(WorkFailed, match="logits contain NaN"):
        scores_of(SINGLE, logits * np.nan, None, None)


@pytest.mark.parametrize("width", [3, 80], ids=["more examples than features", "fewer"])
def test_distances_are_those_of_the_papers(width):
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 3, 60) * 2  # class 1 has no example
    train = rng.normal(size=(60, width)) + classes[:, None]
    inputs = rng.normal(size=(20, width)) * 3
    reference = Reference.of(train.astype(np.float32), classes)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    far = NearestNeighbors(n_neighbors=10).fit(unit(train)).kneighbors(unit(inputs))[0][:, -1]
    assert reference.neighbors(inputs) == pytest.approx(far, abs=1e-5)
    means = np.stack([train[classes == c].mean(0) for c in (0, 2, 4)])
    covariance, _ = ledoit_wolf(train - means[classes // 2], assume_centered=True)
    inverse = np.linalg.inv(covariance)
    away = [min((x - m) @ inverse @ (x - m) for m in means) for x in inputs]
    assert reference.mahalanobis(inputs) == pytest.approx(away, rel=1e-4)
    assert set(scores_of(SINGLE, inputs, inputs, reference)) == {"energy", "neighbors", "mahalanobis"}


def test_references_at_the_edge():
    same = Reference.of(np.ones((3, 4)), np.array([0, 0, 1]))
    assert np.isfinite(same.mahalanobis(np.zeros((2, 4)))).all() and same.neighbors(np.ones((1, 4)))[0] < 1e-6
    assert len(Reference.of(np.eye(4), classes_of(MULTI, np.eye(4))).means) == 1
    assert classes_of(SINGLE, np.array([1])).tolist() == [1]
    with pytest.raises(WorkFailed, match="features of the training examples contain NaN"):
        Reference.of(np.full((3, 2), np.nan), None)


def test_separation_is_scikit_learns_with_ties():
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(size=300).round(1), (rng.normal(size=200) + 1).round(1)
    found = separation(inside, outside)
    truth = [0] * 300 + [1] * 200
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, np.concatenate([inside, outside])), abs=1e-12)
    low, high = found["interval"]
    assert low < found["auroc"] < high and 0.04 < high - low < 0.12
    accepted = np.sort(inside)[int(np.ceil(0.95 * 299))]
    assert found["fpr95"] == (outside <= accepted).mean()
    assert separation(inside, outside) == found != separation(inside, outside, seed=1)
    assert separation(np.zeros(5), np.ones(5)) == {"auroc": 1.0, "interval": [1.0, 1.0], "fpr95": 0.0}
    assert separation(np.zeros(5), np.zeros(4))["auroc"] == 0.5
