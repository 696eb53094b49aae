"""The curve of a range test: smoothing and suggestions, on curves whose answers can be counted."""

from __future__ import annotations

import math

import pytest

from hf_transfer.analysis.range_test import Curve, has_diverged, rates_between, smooth


def test_rates_are_multiples_of_each_other():
    rates = rates_between(1e-7, 1.0, 8)
    assert rates == pytest.approx([10.0**power for power in range(-7, 1)], rel=1e-12)


def test_the_average_is_corrected_for_its_start():
    assert list(smooth([3.0, 3.0, 3.0])) == pytest.approx([3.0] * 3)
    # 0.98 * 0.02 * 1 + 0.02 * 2 = 0.0596, over 1 - 0.98^2 = 0.0396
    assert list(smooth([1.0, 2.0])) == pytest.approx([1.0, 0.0596 / 0.0396])


@pytest.mark.parametrize(
    ("smoothed", "answer"), [((1.0, 3.9), False), ((1.0, 4.1), True), ((1.0, math.nan), True), ((1.0, math.inf), True)]
)
def test_divergence(smoothed, answer):
    assert has_diverged(smoothed) is answer


def without_smoothing(losses) -> list[float]:
    """Losses whose average is `losses`."""
    raw, average = [], 0.0
    for step, wanted in enumerate(losses, start=1):
        following = wanted * (1 - 0.98**step)
        raw.append((following - 0.98 * average) / 0.02)
        average = following
    return raw


def test_suggestions():
    """50 steps, of which the first 5 and the last 5 are left out: a slow rise, a fall from 20 to 30, then a rise."""
    smoothed = (
        [2.0 + 0.001 * i for i in range(20)]
        + [2.0 - 0.1 * i for i in range(1, 6)]
        + [1.5 - 0.05 * i for i in range(1, 6)]
    )
    smoothed += [1.25 + 0.1 * i for i in range(1, 21)]
    rates = rates_between(1e-7, 1.0, 50)
    curve = Curve(tuple(rates), tuple(without_smoothing(smoothed)))
    assert curve.smoothed == pytest.approx(smoothed)
    found = curve.suggestions
    assert found["minimum"] == pytest.approx(rates[29] / 10)
    assert rates[19] <= found["steep"] <= rates[23]
    # the fall has 11 steps and ends at 29; fastai counts its start as one before: 18 + 3 + 1
    assert found["valley"] == pytest.approx(rates[22])


@pytest.mark.parametrize("losses", [[1.0] * 40, [1.0 + 0.01 * i for i in range(40)], [1.0] * 7])
def test_nothing_is_suggested_where_the_loss_never_falls(losses):
    assert Curve(tuple(rates_between(1e-7, 1.0, len(losses))), tuple(losses)).suggestions == {}


def test_csv():
    text = Curve((1e-7, 1e-6), (2.0, 2.0)).to_csv()
    assert text == "learning_rate,loss,smoothed_loss\n1e-07,2,2\n1e-06,2,2\n"
