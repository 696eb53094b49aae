"""The penalties of domain adaptation, against numpy, closed forms and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from hf_transfer.objectives.adaptation import frozen
from hf_transfer.objectives.adaptation.adversarial import confusion, discriminator, reverse
from hf_transfer.objectives.adaptation.coral import coral
from hf_transfer.objectives.adaptation.mmd import FACTORS, mmd
from hf_transfer.objectives.adaptation.schedule import ramp, weight_at


def sample(rows, width=5, seed=0, shift=0.0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def mmd_by_loops(source, target, unbiased):
    both = np.concatenate([source, target])
    distance = [[float(((a - b) ** 2).sum()) for b in both] for a in both]
    median = torch.tensor([d for i, row in enumerate(distance) for j, d in enumerate(row) if i != j]).median().item()
    kernel = [[np.mean([math.exp(-d / (median * f)) for f in FACTORS]) for d in row] for row in distance]
    n, m = len(source), len(target)

    def within(begin, end):
        pairs = [kernel[i][j] for i in range(begin, end) for j in range(begin, end) if not unbiased or i != j]
        return sum(pairs) / len(pairs)

    across = np.mean([kernel[i][j] for i in range(n) for j in range(n, n + m)])
    return within(0, n) + within(n, n + m) - 2 * across


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_is_that_of_explicit_sums(unbiased):
    source, target = sample(7), sample(4, seed=1, shift=0.8)
    expected = mmd_by_loops(source.numpy(), target.numpy(), unbiased)
    assert float(mmd(source, target, unbiased)) == pytest.approx(expected, abs=1e-6)


def test_mmd_of_a_sample_with_itself_is_0_if_biased_and_below_if_not():
    rows = sample(9)
    assert abs(float(mmd(rows, rows, unbiased=False))) < 1e-12
    assert float(mmd(rows, rows)) < 0
    far = [float(mmd(sample(64), sample(64, seed=1, shift=s))) for s in (0.0, 0.5, 2.0)]
    assert abs(far[0]) < 0.02 < far[1] < far[2]
    offset = float(mmd(sample(9).float() + 1000, sample(8, seed=1).float() + 1000))  # digits lost in large numbers
    assert offset == pytest.approx(float(mmd(sample(9), sample(8, seed=1))), abs=1e-3)


def test_the_unbiased_mmd_is_0_on_average_over_samples_of_one_distribution():
    values = torch.stack([mmd(sample(6, seed=2 * i), sample(6, seed=2 * i + 1)) for i in range(300)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(300)
    biased = [float(mmd(sample(6, seed=2 * i), sample(6, seed=2 * i + 1), unbiased=False)) for i in range(20)]
    assert min(biased) > 0


def test_the_gradient_of_mmd_draws_the_samples_together():
    moved = sample(16, seed=1, shift=1.0).requires_grad_(True)
    before = mmd(sample(16), moved)
    before.backward()
    assert mmd(sample(16), moved - 0.5 * moved.grad) < before


def test_coral_is_its_formula():
    source, target = sample(8), sample(6, seed=1) * 2
    difference = np.cov(source.numpy().T) - np.cov(target.numpy().T)
    expected = np.linalg.norm(difference, "fro") ** 2 / (4 * source.shape[1] ** 2)
    assert float(coral(source, target)) == pytest.approx(expected, rel=1e-12)
    assert float(coral(source, source + 3)) == pytest.approx(0, abs=1e-24)  # the means do not count


@pytest.mark.parametrize("distance", [mmd, coral])
def test_a_single_row_has_no_statistics(distance):
    one, two = sample(1).requires_grad_(True), sample(3, seed=1).requires_grad_(True)
    value = distance(one, two)
    value.backward()
    assert value == 0 and not one.grad.any() and not two.grad.any()


def test_reversal_turns_the_sign_and_scales():
    values = sample(3).requires_grad_(True)
    reversed_below = reverse(values, 0.3)
    assert torch.equal(reversed_below, values)
    weights = sample(3, seed=5)
    (reversed_below * weights).sum().backward()
    assert torch.equal(values.grad, -0.3 * weights)
    assert torch.autograd.gradcheck(lambda x: reverse(x, -1.0), sample(2).requires_grad_(True))


def test_the_discriminator_learns_at_full_weight_and_the_features_at_the_factor():
    critic, domain = discriminator(5, seed=0).double(), torch.tensor([0, 0, 0, 1, 1, 1])
    rows = sample(6)

    def gradients(factor):
        features = rows.clone().requires_grad_(True)
        critic.zero_grad()
        loss = confusion(critic, features, domain, factor)
        loss.backward()
        return float(loss.detach()), features.grad, [p.grad.clone() for p in critic.parameters()]

    plain = rows.clone().requires_grad_(True)
    expected = nn.functional.binary_cross_entropy_with_logits(critic(plain)[:, 0], domain.double())
    expected.backward()
    for factor in (0.0, 0.25, 1.0):
        loss, of_features, of_critic = gradients(factor)
        assert loss == float(expected.detach())
        assert torch.equal(of_features, -factor * plain.grad)
        assert all(torch.equal(a, b) for a, b in zip(of_critic, gradients(1.0)[2], strict=True))


def test_a_discriminator_depends_on_its_seed_and_leaves_the_random_state():
    state = torch.random.get_rng_state()
    one, same, other = (discriminator(4, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one[1].weight, same[1].weight) and not torch.equal(one[1].weight, other[1].weight)


def test_the_size_of_the_features_tells_a_discriminator_nothing():
    critic, rows = discriminator(5, seed=0).double(), sample(6)
    assert torch.allclose(critic(rows), critic(7 * rows + 2), atol=1e-3)


@pytest.mark.parametrize(("progress", "expected"), [(0, 0.0), (0.1, 0.46211715726000973), (1, 0.9999092042625951)])
def test_the_ramp_is_the_papers(progress, expected):
    assert ramp(progress) == pytest.approx(expected, abs=1e-15)  # tanh(5 p)
    assert weight_at("ramp", 2.0, progress) == 2 * ramp(progress)
    assert weight_at("constant", 2.0, progress) == 2.0


# ---- frozen features -------------------------------------------------------------------------------------------------


def moments(rows):
    return rows.mean(0), torch.from_numpy(np.cov(rows.numpy().T))


@pytest.mark.parametrize("method", ["coral", "linear-ot"])
def test_mapped_features_have_the_mean_and_covariance_of_the_target(method, monkeypatch):
    """Up to the shrinkage of the covariances, which is left out here."""
    monkeypatch.setattr(frozen, "covariance", lambda rows: moments(rows)[1])
    mix = sample(5, seed=3)
    source, target = sample(200) @ mix, sample(150, seed=1, shift=3.0)
    mapped = frozen.align(method, source, target)(source)
    for own, other in zip(moments(mapped), moments(target), strict=True):
        assert torch.allclose(own, other, atol=1e-9)
    same = frozen.align(method, source, source)(source)
    assert torch.allclose(same, source, atol=1e-9), "nothing to align"


def test_the_maps_are_those_of_matrix_square_roots():
    source, target = (moments(sample(50, seed=s) @ sample(5, seed=9 + s))[1] for s in (0, 1))
    root = torch.from_numpy(linalg.sqrtm(source.numpy()))
    inverse = torch.linalg.inv(root)
    other = torch.from_numpy(linalg.sqrtm(target.numpy()))
    assert torch.allclose(frozen.coral_map(source, target), inverse @ other, atol=1e-8)
    between = torch.from_numpy(linalg.sqrtm((root @ target @ root).numpy()))
    assert torch.allclose(frozen.transport_map(source, target), inverse @ between @ inverse, atol=1e-8)
    transport = frozen.transport_map(source, target)
    assert torch.allclose(transport, transport.T, atol=1e-9), "as the gradient of a convex function is"


def test_transport_moves_the_examples_least(monkeypatch):
    monkeypatch.setattr(frozen, "covariance", lambda rows: moments(rows)[1])
    source, target = sample(300) @ sample(5, seed=3), sample(300, seed=1) @ sample(5, seed=4)
    moved = [float((frozen.align(m, source, target)(source) - source).square().sum()) for m in ("linear-ot", "coral")]
    assert moved[0] < moved[1]


def test_features_without_variance_and_samples_smaller_than_the_width():
    source, target = sample(4, width=9), sample(3, width=9, seed=1)
    source[:, 2], target[:, 2] = 1.0, 1.0
    for method in ("coral", "linear-ot"):
        assert frozen.align(method, source, target)(source).isfinite().all()
        flat = torch.ones(4, 9)
        assert frozen.align(method, flat, flat + 1)(flat).equal(flat + 1)


def test_the_maps_are_those_of_skada_and_pot():
    """With their shrinkage; skada moves both domains to mean 0."""
    skada, gaussian = pytest.importorskip("skada"), pytest.importorskip("ot.gaussian")
    source, target = sample(40, width=9) * torch.arange(1, 10), sample(30, width=9, seed=1, shift=3.0)
    ours = [frozen.align(method, source, target)(source).numpy() for method in ("coral", "linear-ot")]
    x, domain = np.concatenate([source, target]), np.repeat([1, -2], [40, 30])
    theirs = skada.CORALAdapter().fit_transform(x, sample_domain=domain)[:40]
    assert np.allclose(ours[0] - target.numpy().mean(0), theirs, atol=1e-8)
    means, covariances = (source.numpy().mean(0), target.numpy().mean(0)), map(frozen.covariance, (source, target))
    matrix, offset = gaussian.bures_wasserstein_mapping(*means, *(one.numpy() for one in covariances))
    assert np.allclose(ours[1], source.numpy() @ matrix + offset, atol=1e-8)
