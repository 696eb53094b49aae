"""The penalties of domain adaptation, against numpy, closed forms and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

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
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize(("progress", "expected"), [(0, 0.0), (0.1, 0.46211715726000973), (1, 0.9999092042625951)])
def test_the_ramp_is_the_papers(progress, expected):
    assert ramp(progress) == pytest.approx(expected, abs=1e-15)  # tanh(5 p)
    assert weight_at("ramp", 2.0, progress) == 2 * ramp(progress)
    assert weight_at("constant", 2.0, progress) == 2.0
