"""The distance of two domains: closed cases, and scikit-learn's principal components."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA

from hf_transfer.analysis.domain_distance import Distance, distance, plane
from hf_transfer.objectives.adaptation.distance_in_words import before_in_words, both_in_words
from hf_transfer.objectives.adaptation.mmd import mmd
from hf_transfer.report.domain_plot import draw


def rows(count, shift=0.0, seed=0, width=6):
    made = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    made[:, 0] += shift
    return made


def test_domains_that_a_line_separates_are_2_apart_and_equal_ones_0():
    apart = distance(rows(40), rows(40, 30.0, seed=1), seed=0)
    assert (apart.proxy_a_distance, apart.error) == (2.0, 0.0)
    same = rows(40)
    alike = distance(same, same, seed=0)
    assert alike.proxy_a_distance == 0.0 and alike.error >= 0.5, "never below 0"
    assert apart.mmd == float(mmd(rows(40).double(), rows(40, 30.0, seed=1).double()))


def test_of_two_normal_distributions_it_is_that_of_their_best_classifier():
    """Whose error is Φ(-s/2) for a shift of s standard deviations."""
    shift = 1.5
    found = distance(rows(2000), rows(2000, shift, seed=1), seed=0)
    error = float(torch.distributions.Normal(0, 1).cdf(torch.tensor(-shift / 2)))
    assert found.error == pytest.approx(error, abs=0.02)
    assert found.proxy_a_distance == pytest.approx(2 * (1 - 2 * found.error))


def test_the_plane_is_that_of_the_principal_components():
    source, target = rows(30) * torch.arange(1.0, 7), rows(20, 2.0, seed=1)
    made, oracle = plane(source, target), PCA(2).fit(torch.cat([source, target]).double().numpy())
    expected = torch.from_numpy(oracle.transform(torch.cat([source, target]).double().numpy()))
    found = torch.cat([made.source, made.target])
    assert torch.allclose(found.abs(), expected.abs(), atol=1e-6)
    assert made.shares == pytest.approx(tuple(oracle.explained_variance_ratio_), abs=1e-9)
    narrow = plane(torch.ones(3, 1), torch.zeros(3, 1))
    assert narrow.source.shape == (3, 2) and narrow.shares == (1.0, 0.0)
    picture = draw({"before": (made.source.numpy(), made.target.numpy(), made.shares)})
    assert picture.startswith(b"\x89PNG")


def test_what_is_said_of_it():
    far, near = Distance(1.9, 0.025, 0.4).to_dict(), Distance(0.1, 0.475, 0.0).to_dict()
    seen = {"layer": "what the head reads", "examples": 500, "before": far}
    assert "apart in 97.5% of cases, proxy A-distance 1.90 of 2; MMD 0.400." in before_in_words(seen)
    assert "little to adapt to" in before_in_words({**seen, "before": near})
    assert both_in_words(seen) == both_in_words(None) == "", "not measured after training"
    assert "proxy A-distance 1.90 before, 0.10 after training" in both_in_words(
        {**seen, "after": near, "aligned": False}
    )
    assert before_in_words({"skipped": "x"}) == "Domain distance: not measured, because x."
