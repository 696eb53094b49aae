"""The accuracy to expect: the curve against known ones, what the interval is made of, its coverage on drawn data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_transfer.analysis.expected import HEAD_ALONE, TEXTS, Added, expected_accuracy, interval
from hf_transfer.analysis.learning_curve import Point, forecast, measure
from hf_transfer.features.cross_validation import stratified_order

NOTHING = Added(0.0, 0.0, 0.0, "")


def test_every_beginning_of_the_order_has_the_classes_in_their_proportions():
    stratum = np.repeat([0, 1, 2], [60, 30, 10])
    order = stratified_order(stratum, 3)
    assert sorted(order) == list(range(100)) and not np.array_equal(order, stratified_order(stratum, 4))
    for size in (10, 20, 50):
        counts = np.bincount(stratum[order[:size]], minlength=3)
        np.testing.assert_allclose(counts, np.array([0.6, 0.3, 0.1]) * size, atol=1)


@pytest.mark.parametrize(("level", "slope", "exponent"), [(0.1, 0.5, 0.5), (0.0, 1.0, 0.3), (0.2, 0.0, 1.0)])
def test_a_power_law_without_noise_is_continued(level, slope, exponent):
    def curve(n):
        return level + slope * n**-exponent

    points = [Point(n, curve(n), 1e-4) for n in (64, 128, 256, 410)]
    ahead = forecast(points, 512, 10**9)
    assert ahead.error == pytest.approx(curve(512), abs=2e-3)
    assert ahead.gain == pytest.approx(curve(512) - curve(1024), abs=4e-3)
    assert forecast(points, 4096, 10**9).error_sd > ahead.error_sd, "the further, the less is known"


def test_noisy_points_leave_the_gain_open_and_it_is_never_negative():
    rising = [Point(20, 0.30, 0.05), Point(40, 0.32, 0.05), Point(80, 0.35, 0.05)]
    ahead = forecast(rising, 100, 100)
    assert 0 <= ahead.gain < 0.02 and ahead.gain_sd > 0.01


def test_what_the_interval_is_made_of():
    accuracy, low, high = interval(0.8, 1e-9, NOTHING, 100, 400)
    assert accuracy == pytest.approx(0.8) and high - low == pytest.approx(2 * 1.645 * math.sqrt(0.16 / 400), rel=0.02)
    assert interval(0.8, 0.02, NOTHING, 100, 400)[1] < low, "the noise of what was looked at"
    assert interval(0.8, 1e-9, HEAD_ALONE, 100, 400)[1] < low, "the spread between runs"
    shifted = interval(0.5, 1e-9, Added(0.2, 0.1, 0.0, ""), round(100 * math.e), 10**9)
    assert shifted[0] == pytest.approx(1 / (1 + math.exp(-0.3)), abs=1e-3)


def blobs(size, seed, width=6):
    """Two classes of which the best linear head is right on 0.84: examples and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % 2)
    x = rng.normal(size=(size, width))
    x[:, 0] += 2 * labels
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def test_nine_of_ten_intervals_hold_the_outcome_of_a_head_alone():
    """The head is solved for anew on all examples and tested on others, as a run does."""
    from hf_transfer.features.convex_head import SINGLE, Problem

    held = 0
    for seed in range(12):
        x, y = blobs(60 + 20 * (seed % 3), seed)
        found = expected_accuracy({"layer": x}, y, 2, examples=len(y), split=("test", 200), added=HEAD_ALONE, seed=seed)
        assert found.layer == "layer" and found.looked_at == len(y) and found.gain >= 0
        test, truth = blobs(200, 1000 + seed)
        (head,) = Problem(SINGLE, x, y, 2).path([0.1])
        outcome = float((head.logits(test).argmax(1) == truth).double().mean())
        held += found.low <= outcome <= found.high
    assert 9 <= held <= 12


def test_of_two_layers_the_better_one_counts_and_nothing_draws_random_numbers():
    x, y = blobs(80, 0)
    state = torch.get_rng_state()
    noise = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
    found = expected_accuracy(
        {"noise": noise, "layer": x}, y, 2, examples=80, split=("validation", 50), added=TEXTS, seed=0
    )
    assert torch.equal(state, torch.get_rng_state())
    assert found.layer == "layer" and found.split == "validation"
    assert found.accuracy > found.frozen - 0.01 and "MiniLM" in found.lines()[1]
    assert found.line().startswith(f"Expected validation accuracy: about {found.accuracy:.2f} (")
    sizes = [point["examples"] for point in found.to_dict()["curve"]]
    assert sizes == [10, 20, 40, 64]


def test_classes_without_an_example_in_a_subset_are_no_obstacle():
    x, y = blobs(48, 0)
    y = torch.where(torch.arange(48) < 2, 2, y)  # two examples of a third class
    points = measure(x, y, 3, [1.0, 0.1], 0)
    assert [point.examples for point in points] == [6, 12, 24, 38] and all(0 <= p.error <= 1 for p in points)
