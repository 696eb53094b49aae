"""Split conformal sets: exact on an example made by hand, and their coverage on exchangeable data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from hf_transfer.errors import UserError
from hf_transfer.evaluation import conformal
from hf_transfer.evaluation.conformal import in_set, limit_of, record_of


def test_nine_examples_made_by_hand():
    own = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    logits = np.log(np.stack([own, 1 - own], axis=-1))
    record = record_of(logits, np.zeros(9, int))
    assert record == {"examples": 9, "scores": pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], abs=2e-6)}
    # ceil((9 + 1) * coverage) is the rank
    for coverage, limit in ((0.9, 0.9), (0.81, 0.9), (0.8, 0.8), (0.55, 0.6), (0.5, 0.5), (0.01, 0.1)):
        assert limit_of(record, coverage) == pytest.approx(limit, abs=2e-6)
    sets = in_set(np.array([[0.75, 0.2, 0.05], [0.45, 0.4, 0.15], [0.3, 0.35, 0.35]]), limit_of(record, 0.6))
    assert sets.tolist() == [[True, False, False], [True, True, False], [False, False, False]]


def test_too_few_examples_for_a_coverage():
    record = record_of(np.zeros((9, 2)), np.zeros(9, int))
    with pytest.raises(UserError, match=r"coverage: 0.95 needs at least 19 validation examples, and the run had 9"):
        limit_of(record, 0.95)
    for coverage in (0.9, 0.95, 0.99, 0.7, 0.55):  # the number that the message names is the smallest
        with pytest.raises(UserError) as told:
            limit_of({"examples": 1, "scores": [0.5]}, coverage)
        least = int(str(told.value).split("at least ")[1].split(" ")[0])
        limit_of(record_of(np.zeros((least, 2)), np.zeros(least, int)), coverage)
        with pytest.raises(UserError, match="needs at least"):
            limit_of(record_of(np.zeros((least - 1, 2)), np.zeros(least - 1, int)), coverage)


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, 90, float("nan")])
def test_a_coverage_that_is_no_probability(coverage):
    with pytest.raises(UserError, match="coverage: expected a number above 0 and below 1"):
        limit_of(record_of(np.zeros((9, 2)), np.zeros(9, int)), coverage)


def test_a_model_without_scores():
    with pytest.raises(UserError, match=r"abstain: .*config.json holds no scores"):
        limit_of(None, 0.9)
    assert record_of(np.full((3, 2), np.nan), np.zeros(3, int)) is None
    assert record_of(np.zeros((3, 2)), np.full(3, -100)) is None


def covered(coverage: float, count: int, draws: int) -> float:
    """Mean coverage over `draws` sets of `count` held-out examples, whatever the model's probabilities are worth."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(draws):
        truth = rng.normal(size=(count + 200, 4)) * 2
        labels = (softmax(truth, axis=-1).cumsum(-1) < rng.random((len(truth), 1))).sum(-1)
        logits = truth * 3 + rng.normal(size=truth.shape)  # overconfident and wrong
        record = record_of(logits[:count], labels[:count])
        sets = in_set(softmax(logits[count:], axis=-1), limit_of(record, coverage))
        shares.append(sets[np.arange(200), labels[count:]].mean())
    return float(np.mean(shares))


@pytest.mark.parametrize(("coverage", "count"), [(0.9, 40), (0.8, 25), (0.5, 101)])
def test_the_coverage_is_at_least_what_was_asked_and_at_most_one_example_more(coverage, count):
    """Angelopoulos and Bates 2021, theorem 1 and appendix D: between the coverage and the coverage + 1 / (n + 1)."""
    draws = 400
    error = 4 * np.sqrt(coverage * (1 - coverage) * (1 / (count + 2) + 1 / 200) / draws)
    assert coverage - error < covered(coverage, count, draws) < coverage + 1 / (count + 1) + error


def test_of_many_scores_a_thousand_are_stored_and_sets_are_never_smaller(monkeypatch):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5000, 3)), rng.integers(0, 3, 5000)
    few = record_of(logits, labels)
    monkeypatch.setattr(conformal, "_MOST", 5000)
    every = record_of(logits, labels)
    limits = {c: limit_of(every, c) for c in (0.1, 0.5, 0.9, 0.99, 0.999)}
    monkeypatch.setattr(conformal, "_MOST", 1000)
    assert len(few["scores"]) == 1000 and few["examples"] == 5000
    for coverage, limit in limits.items():
        assert limit <= limit_of(few, coverage) <= limit_of(every | few, min(coverage + 0.001, 0.9998))
