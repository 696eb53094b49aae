"""Fitting a temperature: exact values, few or easy examples, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax
from scipy.stats import entropy
from scipy.stats import t as student

from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation import calibration
from hf_transfer.evaluation.calibration import EXPECTED_FREEDOM, EXPECTED_SCALE, HIGHEST, LOWEST, PRIOR, fit_temperature
from hf_transfer.evaluation.metrics import compute


def drawn(count: int, temperature: float, classes: int = 4, seed: int = 0):
    """Logits that are calibrated after a division by `temperature`, and labels drawn accordingly."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) * 2
    labels = np.array([rng.choice(classes, p=p) for p in softmax(logits, axis=-1)])
    return (logits * temperature).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 5.0])
def test_it_finds_the_temperature_that_the_labels_were_drawn_with(temperature):
    logits, labels = drawn(4000, temperature)
    fit = fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(temperature, rel=0.06)
    assert fit.nll_after <= fit.nll_before and fit.examples == 4000 and not fit.is_bound
    if temperature != 1:
        assert fit.ece_after < fit.ece_before / 3


def test_nll_and_ece_are_those_of_the_metrics_and_t_minimizes_the_likelihood_with_its_prior():
    logits, labels = drawn(50, 3.0)
    fit = fit_temperature(logits, labels)

    def objective(u: float) -> float:
        return -log_softmax(logits / np.exp(u), axis=-1)[np.arange(50), labels].sum() + PRIOR / 2 * u**2

    assert np.log(fit.temperature) == pytest.approx(minimize_scalar(objective, bracket=(0, 1)).x, abs=2e-3)
    for value, scale in ((fit.nll_before, 1.0), (fit.nll_after, fit.temperature)):
        assert value == pytest.approx(-log_softmax(logits / scale, axis=-1)[np.arange(50), labels].mean())
    for value, scale in ((fit.ece_before, 1.0), (fit.ece_after, fit.temperature)):
        assert value == pytest.approx(compute("single_label_classification", logits / scale, labels)["ece"])


@pytest.mark.parametrize("kind", ["one label", "several labels"])
def test_the_prior_is_about_the_temperature_with_the_expected_entropy(kind):
    """scipy's entropy as the oracle."""
    logits, labels = drawn(25, 6.0)
    labels = labels if kind == "one label" else np.eye(4)[labels]

    def uncertainty(scale: float) -> float:
        if kind == "one label":
            return float(entropy(softmax(logits / scale, axis=-1), axis=-1).mean())
        p = expit(logits / scale)
        return float(entropy(np.stack([p, 1 - p]), axis=0).mean())

    for scale in (4.0, 9.0):
        fit = fit_temperature(logits, labels, uncertainty(scale))
        assert fit.expected == pytest.approx(scale, rel=1e-3)
        if kind == "one label":
            assert np.log(fit.temperature) == pytest.approx(likeliest(logits, labels, scale), abs=2e-3)
        else:
            alone = fit_temperature(np.tile(logits, (100, 1)), np.tile(labels, (100, 1))).temperature
            assert min(alone, scale) < fit.temperature < max(alone, scale)


def likeliest(logits, labels, expected: float) -> float:
    """log T by trying all: of the likelihood and of scipy's t distribution."""
    every = np.linspace(np.log(LOWEST), np.log(HIGHEST), 20_001)
    rows = np.arange(len(labels))
    fits = [log_softmax(logits / np.exp(u), axis=-1)[rows, labels].sum() for u in every]
    prior = student.logpdf((every - np.log(expected)) / EXPECTED_SCALE, EXPECTED_FREEDOM)
    return float(every[np.argmax(np.array(fits) + prior)])


def test_the_examples_overrule_what_is_expected_where_they_clearly_differ():
    """The other classifier is far worse than the model: its loss would make the model far too uncertain."""
    logits, labels = drawn(400, 1.0)
    fit = fit_temperature(logits, labels, 1.3)
    assert fit.expected > 3 and 0.8 < fit.temperature < 1.3
    few = fit_temperature(logits[:30], labels[:30], 1.3)
    assert np.log(few.temperature) == pytest.approx(likeliest(logits[:30], labels[:30], few.expected), abs=2e-3)


def test_a_loss_that_no_temperature_has_says_nothing():
    logits, labels = drawn(25, 1.0)
    plain = fit_temperature(logits, labels)
    for loss in (2.0, 0.0):  # above log(4), or certain
        assert fit_temperature(logits, labels, loss) == plain and plain.expected is None


def test_few_examples_that_are_all_right_do_not_make_the_model_certain(monkeypatch):
    logits = np.zeros((38, 2))
    logits[:, 0] = np.linspace(0.5, 4, 38)
    labels = np.zeros(38, int)
    fit = fit_temperature(logits, labels)
    assert 0.4 < fit.temperature < 1 and not fit.is_bound
    monkeypatch.setattr(calibration, "PRIOR", 0.0)
    assert fit_temperature(logits, labels).is_bound  # the likelihood alone


def test_the_bounds_are_reached_and_reported():
    logits, labels = np.tile([[100.0, -100.0]], (500, 1)), np.arange(500) % 2
    fit = fit_temperature(logits, labels)
    assert (fit.temperature, fit.is_bound) == (pytest.approx(HIGHEST), True)
    assert "the limit" in calibration.describe(fit.to_dict())
    tiny = np.tile([[1e-3, -1e-3]], (5000, 1))
    fit = fit_temperature(tiny, np.zeros(5000, int))
    assert (fit.temperature, fit.is_bound) == (pytest.approx(LOWEST), True)


def test_one_class_and_all_wrong():
    logits, _ = drawn(60, 1.0)
    assert LOWEST <= fit_temperature(logits, np.zeros(60, int)).temperature <= HIGHEST
    wrong = fit_temperature(logits, logits.argmin(-1))
    assert wrong.temperature > 3


def test_several_labels_have_one_temperature():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1500, 3)) * 2 - [0, 1, 2]
    labels = (rng.random(logits.shape) < expit(logits)).astype(np.float32)
    fit = fit_temperature(logits * 2.5, labels)
    assert fit.temperature == pytest.approx(2.5, rel=0.06) and fit.examples == 1500
    p = expit(logits * 2.5 / fit.temperature)
    assert fit.nll_after == pytest.approx(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1).mean())
    bins = np.minimum((p * 15).astype(int), 14)
    gaps = [abs((labels - p)[bins == b].sum()) for b in range(15)]
    assert fit.ece_after == pytest.approx(sum(gaps) / p.size) and fit.ece_after < fit.ece_before


def test_ignored_labels_do_not_count():
    logits, labels = drawn(80, 2.0)
    more = np.concatenate([logits, np.full((5, 4), np.nan)]), np.concatenate([labels, np.full(5, -100)])
    assert fit_temperature(*more).to_dict() == pytest.approx(fit_temperature(logits, labels).to_dict())


def test_a_large_split_is_thinned_evenly(monkeypatch):
    logits, labels = drawn(400, 2.0)
    monkeypatch.setattr(calibration, "_MOST_VALUES", 400)
    assert fit_temperature(logits, labels) == fit_temperature(logits[::4], labels[::4])


def test_what_cannot_be_fitted_is_an_error():
    logits, labels = drawn(40, 1.0)
    logits[3, 1] = np.nan
    with pytest.raises(WorkFailed, match="NaN or infinite"):
        fit_temperature(logits, labels)
    with pytest.raises(ValueError, match="needs examples"):
        fit_temperature(logits, np.full(40, -100))
    with pytest.raises(ValueError, match="several classes"):
        fit_temperature(logits[:, :1], labels)
