"""Models compared by their frozen features: LogME against the evidence itself, ties, the order, and what is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from hf_transfer.analysis.logme import logme
from hf_transfer.analysis.model_ranking import Answers, Row, answers_of, is_behind, ranked


@pytest.mark.parametrize(("examples", "width"), [(30, 4), (12, 20)])
def test_logme_is_the_greatest_evidence(examples, width):
    """y ~ N(0, X X' / prior + I / noise), maximized by another optimizer over both precisions."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(examples, width)), rng.permutation(np.arange(examples) % 2)
    x[:, 0] += labels

    def negative(logs, y):
        prior, noise = np.exp(logs)
        return -multivariate_normal.logpdf(y, cov=x @ x.T / prior + np.eye(examples) / noise) / examples

    best = [
        -min(minimize(negative, start, args=((labels == c).astype(float),), method="Nelder-Mead").fun
             for start in ([0, 0], [2, 2]))
        for c in (0, 1)
    ]  # fmt: skip
    assert logme(torch.from_numpy(x), torch.from_numpy(labels), 2) == pytest.approx(np.mean(best), abs=2e-3)


def features(noise, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    x = rng.normal(size=(60, 5)) * noise
    x[np.arange(60), labels] += 2
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def test_the_clearer_features_win_and_models_without_answers_come_last():
    clear, labels = features(0.3)
    vague, _ = features(3.0)
    found = {name: answers_of({"last": x}, labels, 3, 0) for name, x in (("vague", vague), ("clear", clear))}
    assert found["clear"].logme > found["vague"].logme and is_behind(found["vague"], found["clear"])
    assert not is_behind(found["clear"], found["clear"])
    rows = [
        Row("broken", why_not="there is no such folder."),
        *(Row(name, size, None, found[name], 1.0) for name, size in (("vague", 2000), ("clear", 1000))),
    ]
    ranking = ranked(rows, 60, 3)
    assert [row.model for row in ranking.rows] == ["clear", "vague", "broken"]
    shown = ranking.to_dict()
    assert shown["largest"] == "vague" and shown["best_on_imagenet"] is None
    assert [row["is_behind"] for row in shown["models"]] == [False, True, None]
    lines = ranking.lines()
    assert "broken: there is no such folder." in lines and "By its size alone one would take vague." in lines
    assert not any(line.startswith("Not clearly behind") for line in lines)
    assert Row("bundled:a", why_not="bundled:a is not installed.").refusal == "bundled:a is not installed."


def test_a_few_more_right_answers_are_no_clear_lead():
    right = torch.arange(100) < 80
    other = right.clone()
    other[:3] = False
    one, best = (Answers("last", x, 0.5, 0.0) for x in (other, right))
    assert not is_behind(one, best), "3 of 100"
    other[:10] = False
    assert is_behind(one, best), "10 of 100"
