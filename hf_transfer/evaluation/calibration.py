"""Temperature scaling: one number that makes a classifier's probabilities match frequencies.

Dividing all logits by a temperature T, fitted on held-out examples, changes probabilities and no ranking (Guo et al.
2017, section 4.2). On few examples, or on examples that are all right, the likelihood alone would make T extreme, so
log T has a prior that weighs as much as a handful of examples: a normal distribution about 0.

Where a loss is known that a calibrated classifier of these data has, it says more: a calibrated classifier's expected
loss is the mean entropy of its predictions, so that the T at which the model is as uncertain as that is the one to
expect. The prior is then Student's t distribution about that T, whose long tails give way where the examples say that
the model is much better or worse than the other classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax, logsumexp

from hf_transfer.data.labels import IGNORED
from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation.scores import CALIBRATION_BINS, Array, all_finite, calibration_error, confidence, parts

LOWEST, HIGHEST = 0.05, 20.0  # bounds of T
PRIOR = 4.0  # precision of log T, measured: see docs/calibration.md
EXPECTED_SCALE, EXPECTED_FREEDOM = 0.25, 2.0  # of log T about log T that is expected, likewise
_MOST_VALUES = 2**24  # logits that a fit reads: more examples would not change T in its third digit
_PRECISION = 1e-4  # of log T
HELD_OUT = "held out"  # of several trainings, by each of them, in place of a split


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Attributes:
        temperature: T; the logits are to be divided by it.
        examples: it was fitted on.
        nll_before: mean negative log-likelihood per example on them, in nats; for several labels, the sum over labels.
        nll_after: likewise, after the division.
        ece_before: expected calibration error on them (15 bins); for several labels, of the pairs of example and label.
        ece_after: likewise, after the division.
        is_bound: whether T is at a bound of what it may be.
        expected: T that was expected of the model's uncertainty, before the labels of these examples were seen; None
            if no loss was expected, or one that no T has.
    """

    temperature: float
    examples: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    is_bound: bool = False
    expected: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return asdict(self)


def describe(calibration: Mapping[str, Any]) -> str:
    """A calibration, as `results.json` holds it, for display."""
    temperature, examples = calibration["temperature"], calibration["examples"]
    nll, ece = ([calibration[f"{name}_{when}"] for when in ("before", "after")] for name in ("nll", "ece"))
    bound = ", the limit" if calibration["is_bound"] else ""
    which = "examples, each held out by one training" if calibration.get("split") == HELD_OUT else "validation examples"
    return (
        f"temperature {temperature:.3g}{bound}, fitted on {examples:,} {which} (there, negative "
        f"log-likelihood {nll[0]:.4f} → {nll[1]:.4f}, ECE {ece[0]:.4f} → {ece[1]:.4f})"
    )


def fit_temperature(logits: Array, labels: Array, expected_loss: float | None = None) -> Calibration:
    """Fit a temperature to held-out logits.

    Args:
        logits: (examples, classes).
        labels: (examples,) class indices, of which `IGNORED` does not count; or (examples, classes) of 0 and 1, for
            which one temperature is fitted to the binary likelihood of all labels.
        expected_loss: mean negative log-likelihood per example, for several labels per pair of example and label, that
            a calibrated classifier of these data has, in nats.

    Raises:
        ValueError: no example counts, or there is a single class.
        WorkFailed: a logit is NaN or infinite.
    """
    logits, labels = counted(logits, labels)
    if not len(labels) or (labels.ndim == 1 and logits.shape[-1] < 2):
        raise ValueError("a temperature needs examples, and probabilities of several classes or labels")
    if not all_finite(logits):
        raise WorkFailed("Calibration: the model's validation logits contain NaN or infinite values.")
    step = -(-logits.size // _MOST_VALUES)
    logits, labels = logits[::step], labels[::step]
    is_single = labels.ndim == 1
    nll, ece, entropy = (_nll, _ece, _entropy) if is_single else (_binary_nll, _binary_ece, _binary_entropy)
    expected = None if expected_loss is None else _as_uncertain(entropy, logits, expected_loss)
    temperature, is_bound = _minimize(lambda t: nll(logits, labels, t), expected)
    return Calibration(
        temperature=temperature,
        examples=len(labels),
        nll_before=nll(logits, labels, 1.0) / len(labels),
        nll_after=nll(logits, labels, temperature) / len(labels),
        ece_before=ece(logits, labels, 1.0),
        ece_after=ece(logits, labels, temperature),
        is_bound=is_bound,
        expected=expected,
    )


def counted(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Logits and labels without the examples whose label is ignored."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if labels.ndim > 1 or not (labels == IGNORED).any():
        return logits, labels
    return logits[labels != IGNORED], labels[labels != IGNORED]


def _minimize(nll: Callable[[float], float], expected: float | None) -> tuple[float, bool]:
    """(the temperature between the bounds with the least nll minus log-prior, whether it is a bound)."""
    low, high = np.log(LOWEST), np.log(HIGHEST)

    def search(objective: Callable[[float], float], low: float, high: float) -> Any:
        bounds = (low, max(high, low + _PRECISION))
        return minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": _PRECISION})

    if expected is None:
        found = search(lambda u: nll(float(np.exp(u))) + PRIOR / 2 * u**2, low, high)
    else:
        mean = np.log(expected)

        def objective(u: float) -> float:
            distance = ((u - mean) / EXPECTED_SCALE) ** 2 / EXPECTED_FREEDOM
            return nll(float(np.exp(u))) + (EXPECTED_FREEDOM + 1) / 2 * float(np.log1p(distance))

        # It may have two minima, one near what is expected and one near the likeliest.
        near, far = sorted([mean, search(lambda u: nll(float(np.exp(u))), low, high).x])
        middle = (near + far) / 2
        found = min(search(objective, near, middle), search(objective, middle, far), key=lambda one: one.fun)
    nearest = min((low, high), key=lambda bound: abs(bound - found.x))
    if abs(nearest - found.x) < 10 * _PRECISION:
        return float(np.exp(nearest)), True
    return float(np.exp(found.x)), False


def _as_uncertain(entropy: Callable[[Array, float], float], logits: Array, loss: float) -> float | None:
    """The temperature at which the mean entropy of the predictions, which grows with it, is `loss`; None if at none."""
    if not entropy(logits, LOWEST) < loss < entropy(logits, HIGHEST):
        return None
    low, high = np.log(LOWEST), np.log(HIGHEST)
    found = brentq(lambda u: entropy(logits, float(np.exp(u))) - loss, low, high, xtol=_PRECISION)
    return float(np.exp(found))


# ---- one label -------------------------------------------------------------------------------------------------------


def _nll(logits: Array, labels: Array, temperature: float) -> float:
    """Sum of the negative log-likelihood, in nats."""
    total = 0.0
    for part in parts(*logits.shape):
        z = logits[part].astype(np.float64) / temperature
        own = np.take_along_axis(z, labels[part, None].astype(int), axis=-1)[:, 0]
        total += float((logsumexp(z, axis=-1) - own).sum())
    return total


def _entropy(logits: Array, temperature: float) -> float:
    """Mean over examples of the entropy of the prediction, in nats."""
    total = 0.0
    for part in parts(*logits.shape):
        logs = log_softmax(logits[part].astype(np.float64) / temperature, axis=-1)
        total -= float((np.exp(logs) * logs).sum())
    return total / len(logits)


def _ece(logits: Array, labels: Array, temperature: float) -> float:
    right = (logits.argmax(-1) == labels).astype(float)
    return float(calibration_error(confidence(logits / temperature), right))


# ---- several labels --------------------------------------------------------------------------------------------------


def _binary_nll(logits: Array, labels: Array, temperature: float) -> float:
    """Sum over examples and labels of the negative log-likelihood, in nats."""
    total = 0.0
    for part in parts(*logits.shape):
        z = logits[part].astype(np.float64) / temperature
        total += float((np.logaddexp(0.0, z) - z * labels[part]).sum())
    return total


def _binary_entropy(logits: Array, temperature: float) -> float:
    """Mean over pairs of example and label of the entropy of the prediction, in nats."""
    total = 0.0
    for part in parts(*logits.shape):
        z = np.clip(logits[part].astype(np.float64) / temperature, -700, 700)
        total += float((np.logaddexp(0.0, z) - z / (1 + np.exp(-z))).sum())
    return total / logits.size


def _binary_ece(logits: Array, labels: Array, temperature: float) -> float:
    """Mean gap between the probability and the frequency of positives, over equal-width bins of the probability."""
    gaps = np.zeros(CALIBRATION_BINS)
    for part in parts(*logits.shape):
        probability = 1 / (1 + np.exp(-np.clip(logits[part].astype(np.float64) / temperature, -700, 700)))
        bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        gaps += np.bincount(bins.ravel(), (labels[part] - probability).ravel(), CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / logits.size)
