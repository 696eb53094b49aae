"""Scores of a classifier on a target without labels, against plain references; and the choice."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_transfer.analysis.validators import (
    Scores,
    choose,
    deep_embedded,
    density_ratio,
    entropy,
    information,
    neighborhood_density,
)


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(61, 4)) * 3


def test_information_is_the_entropy_of_the_mean_less_the_mean_entropy(logits):
    def of(p):
        return -sum(q * math.log(q) for q in p)

    p = softmax(logits)
    mean = sum(of(row) for row in p) / len(p)
    assert entropy(logits) == pytest.approx(mean, rel=1e-12)
    assert information(logits) == pytest.approx(of(p.mean(0)) - mean, rel=1e-12)
    sure = 1000 * np.eye(4)[np.arange(60) % 4]
    assert information(sure) == pytest.approx(math.log(4)) and entropy(sure) == 0
    assert information(sure[:1].repeat(60, 0)) == pytest.approx(0, abs=1e-12)  # all of one class


@pytest.mark.parametrize("count", [3, 61, 600])  # more than one block of rows
def test_neighborhood_density(count):
    logits = np.random.default_rng(1).normal(size=(count, 5)) * 2
    p = softmax(logits)
    p /= np.sqrt((p**2).sum(1))[:, None]
    similarity, total = p @ p.T / 0.05, 0.0
    for i in range(count):
        others = np.delete(similarity[i], i)
        shares = np.exp(others - others.max())
        shares /= shares.sum()
        total -= (shares * np.log(shares)).sum()
    assert neighborhood_density(logits) == pytest.approx(total / count, rel=1e-9)
    assert neighborhood_density(logits[:2]) is None


def test_deep_embedded_validation():
    """With the covariance and the variance of a sample, as in the authors' estimator."""
    rng = np.random.default_rng(0)
    losses, weights = rng.exponential(size=50), rng.exponential(size=50)
    eta = -np.cov(losses * weights, weights)[0, 1] / np.var(weights, ddof=1)
    assert deep_embedded(losses, weights) == pytest.approx((losses * weights).mean() + eta * weights.mean() - eta)
    assert deep_embedded(losses, np.ones(50)) == pytest.approx(losses.mean())


def test_the_density_ratio_of_two_normal_distributions():
    """Of N(1, 1) over N(0, 1) it is exp(x - 1/2)."""
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(20_000, 1)), rng.normal(size=(10_000, 1)) + 1
    x = np.linspace(-1, 2, 7)[:, None]
    assert density_ratio(source, target, x) == pytest.approx(np.exp(x[:, 0] - 0.5), rel=0.06)


# ---- the choice ----------------------------------------------------------------------------------------------------


def scores(information, accuracy=0.9, entropy=0.5):
    return Scores(information, entropy, None, None, accuracy, 0.01)


@pytest.mark.parametrize(
    ("others", "chosen", "said"),
    [
        (
            {"mmd": scores(1.2), "coral": scores(1.3)},
            "coral",
            {"mmd": "coral has more", "none": "coral has 0.300 more"},
        ),
        ({"mmd": scores(1.04)}, "none", {"mmd": "gain of information on the target, +0.040, is not above 0.05"}),
        ({"mmd": scores(2.0, 0.85)}, "none", {"mmd": "validation split is 0.050 lower"}),
        ({"mmd": scores(2.0, 0.875)}, "mmd", {}),  # within the loss and an error
        ({"mmd": scores(1.2, entropy=0.2)}, "none", {"mmd": "only surer"}),
        ({"mmd": scores(1.2, entropy=0.71)}, "none", {"mmd": "more evenly, but less sure"}),
        ({"mmd": scores(1.2, entropy=0.69)}, "mmd", {}),  # most of what is more evenly divided is information
        ({"mmd": scores(math.nan)}, "none", {"mmd": "NaN"}),
        ({}, "none", {}),
    ],
)
def test_an_adapted_model_must_be_better_by_a_margin_and_no_worse_on_the_source(others, chosen, said):
    verdict = choose({"none": scores(1.0), **others}, "none", margin=0.05, most_loss=0.02)
    assert verdict.chosen == chosen and chosen not in verdict.reasons
    assert set(verdict.reasons) == {"none", *others} - {chosen}
    for name, words in said.items():
        assert words in verdict.reasons[name]


def test_scores_survive_a_file():
    assert Scores.of(scores(1.5).to_dict()) == scores(1.5)
    assert math.isnan(Scores.of({**scores(1.5).to_dict(), "information": None}).information)
