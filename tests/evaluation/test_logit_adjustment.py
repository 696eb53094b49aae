"""Offsets of the logits: which strength is chosen, and what they are."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, f1_score

from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation.logit_adjustment import STRENGTHS, choose_offsets, describe

MEASURES = {
    "f1_macro": lambda y, p: f1_score(y, p, average="macro"),
    "recall_macro": balanced_accuracy_score,
}


def imbalanced(count=600, shares=(0.8, 0.15, 0.05), seed=0):
    """Logits of a classifier that knows the true posterior of overlapping clouds."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), count, p=shares)
    x = np.eye(len(shares))[labels] * 1.2 + rng.normal(size=(count, len(shares)))
    return 1.2 * x + np.log(shares), labels


@pytest.mark.parametrize("metric", MEASURES)
def test_no_strength_has_a_higher_metric(metric):
    logits, labels = imbalanced()
    found = choose_offsets(logits, labels, metric)
    prior = np.log((softmax(logits, 1).sum(0) + 1) / (len(labels) + 3))
    values = [MEASURES[metric](labels, (logits - s * prior).argmax(1)) for s in STRENGTHS]
    assert found.after == pytest.approx(max(values)) and found.before == pytest.approx(values[0])
    assert found.after > found.before + 0.02
    assert MEASURES[metric](labels, (logits + found.offsets).argmax(1)) == pytest.approx(found.after)
    assert values[STRENGTHS.index(found.strength)] == pytest.approx(max(values))
    np.testing.assert_allclose(np.diff(found.offsets), -found.strength * np.diff(prior), atol=1e-12)
    assert sum(found.offsets) == pytest.approx(0) and found.examples == 600
    assert f"{metric} {found.before:.4f} → {found.after:.4f}" in describe(found.to_dict())


def test_the_posterior_is_shifted_by_the_whole_prior_for_balanced_accuracy():
    """Menon et al. 2021: τ = 1. It helps on other examples too."""
    logits, labels = imbalanced(20_000)
    found = choose_offsets(logits, labels, "recall_macro")
    assert found.strength == pytest.approx(1, abs=0.2)
    others, truth = imbalanced(20_000, seed=1)
    before, after = (balanced_accuracy_score(truth, (others + o).argmax(1)) for o in (0, found.offsets))
    assert after > before + 0.05


def test_by_hand():
    """Three of ten are of the rare class; two of them are found once the boundary has moved past -1 and -2."""
    margin = np.array([-9.0, -8, -7, -6, -5, -4, -3, -2, -1, 3])  # of class 1
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    logits = np.stack([np.zeros(10), margin], 1)
    found = choose_offsets(logits, labels, "f1_macro")
    assert (found.before, found.after) == (pytest.approx((14 / 16 + 2 / 4) / 2), 1.0)
    assert 2 < found.offsets[1] - found.offsets[0] < 3


def test_where_nothing_is_gained_nothing_moves():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100)
    right = np.eye(2)[labels] * 8
    for logits in (right, np.zeros((100, 2))):
        found = choose_offsets(logits, labels, "f1_macro")
        assert (found.strength, found.offsets, found.after) == (0.0, (0.0, 0.0), found.before)
    assert describe(found.to_dict()).startswith("none: no strength has a higher f1_macro")


def test_ignored_labels_absent_classes_and_what_is_no_number():
    logits, labels = imbalanced()
    masked = np.concatenate([labels, np.full(50, -100)])
    again = choose_offsets(np.concatenate([logits, logits[:50]]), masked, "f1_macro")
    assert again == choose_offsets(logits, labels, "f1_macro")
    wide = np.concatenate([logits, np.full((600, 1), -50.0)], 1)
    assert np.isfinite(choose_offsets(wide, labels, "f1_macro").offsets).all()
    with pytest.raises(ValueError, match="examples"):
        choose_offsets(logits, np.full(600, -100), "f1_macro")
    logits[3, 1] = np.nan
    with pytest.raises(WorkFailed, match="NaN"):
        choose_offsets(logits, labels, "f1_macro")
