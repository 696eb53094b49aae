"""The accuracy to expect of a run, from linear heads on the frozen features of some of its examples.

The head's accuracy in cross-validation is continued to the run's number of examples (`analysis.learning_curve`). What
fine-tuning adds to it, on the scale of log-odds, and how much that varies, was measured (`benchmarks/expected.py`). The
interval is made of four parts: the noise of the examples that were looked at, the disagreement of the curve's fits, the
binomial noise of the examples that the run is tested on, and the spread of what fine-tuning adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_transfer.analysis.baselines import Distance
from hf_transfer.analysis.learning_curve import Point, forecast, measure
from hf_transfer.analysis.pooling_choice import held_out_losses
from hf_transfer.features.convex_head import SINGLE, STRENGTHS
from hf_transfer.features.cross_validation import Array, divisions

MOST = 512  # examples that are looked at
LEAST = 20  # examples; below, the smallest subset would have less than two of each of two classes
LEAST_PER_CLASS = 4  # examples that are looked at
COVERAGE = 0.9
_QUANTILE = 1.645  # of the normal distribution, for that coverage
_MEASURED = 10_000  # training examples, beyond which what training adds is not extrapolated
_COARSE = STRENGTHS[1::2]  # a decade apart, for the curve and the choice of the layer


@dataclass(frozen=True)
class Added:
    """What training adds to the log-odds of a head on frozen features being right, at `n` training examples.

    Attributes:
        level: at 100 examples.
        slope: more for each factor e of examples.
        sd: between runs.
        of: what it was measured with, in words; empty for a head that is only solved for.
    """

    level: float
    slope: float
    sd: float
    of: str

    def at(self, examples: int) -> float:
        return self.level + self.slope * math.log(min(examples, _MEASURED) / 100)


# From the outcomes in benchmarks/results/expected.md (26 to 576 examples); of texts the slope is that of the tables of
# docs/few-labels.md and docs/benchmarks.md (up to 8,000 examples). The spreads are rounded up; that of a head alone
# allows for what a solver in steps leaves.
HEAD_ALONE = Added(0.0, 0.0, 0.10, "")
TEXTS = Added(0.20, 0.08, 0.25, "MiniLM-L6 on four sets of texts")
WITH_BATCHNORM = Added(0.0, 0.25, 0.40, "EfficientNet-Lite0 and -Lite1 on three sets of images")


@dataclass(frozen=True)
class Expected:
    """The accuracy that a run will probably have.

    Attributes:
        accuracy: the most probable.
        low: with `high` the interval that is meant to hold 90% of outcomes.
        high: its other end.
        frozen: accuracy of a linear head on frozen features alone, with the run's examples.
        frozen_sd: standard deviation of that.
        gain: by how much twice as many examples would raise `accuracy`.
        gain_low: with `gain_high` the interval of that, 90%.
        gain_high: its other end.
        layer: whose features were best.
        looked_at: number of training examples that the model saw.
        examples: number of training examples of the run.
        split: whose accuracy is predicted.
        split_examples: number of its examples.
        curve: accuracy on subsets.
        domain: what the features are worth beside the input itself; None if it was not asked.
        measured_with: where the difference between `frozen` and `accuracy` was measured, in words; empty without one.
    """

    accuracy: float
    low: float
    high: float
    frozen: float
    frozen_sd: float
    gain: float
    gain_low: float
    gain_high: float
    layer: str
    looked_at: int
    examples: int
    split: str
    split_examples: int
    curve: tuple[Point, ...]
    measured_with: str
    domain: Distance | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        points = [{"examples": p.examples, "accuracy": 1 - p.error, "standard_error": p.spread} for p in self.curve]
        domain = self.domain.to_dict() if self.domain else None
        return {**asdict(self), "curve": points, "coverage": COVERAGE, "domain": domain}

    def line(self) -> str:
        """In short."""
        points = (100 * self.gain, 100 * self.gain_low, 100 * self.gain_high)
        return (
            f"Expected {self.split} accuracy: about {self.accuracy:.2f} ({self.low:.2f} to {self.high:.2f}) with these "
            f"{self.examples:,} training examples; twice as many would add about {points[0]:.1f} points "
            f"({points[1]:.1f} to {points[2]:.1f})."
        )

    def lines(self) -> list[str]:
        """For display."""
        seen = "all" if self.looked_at == self.examples else f"{self.looked_at:,}"
        basis = (
            f"  A linear head on the frozen features of {self.layer} is right on {self.frozen:.2f}, by "
            f"a learning curve of subsets of {seen} of them"
        )
        more = f", and training more than the head was measured with {self.measured_with}: other models may gain more"
        rest = f"{basis}{more if self.measured_with else ''}. The interval is meant for 9 of 10 runs."
        return [self.line(), rest, *([self.domain.line()] if self.domain else [])]


def best_layer(
    features: Mapping[str, torch.Tensor], labels: torch.Tensor, outputs: int, seed: int
) -> tuple[str, float, float]:
    """(the layer whose head has the lowest loss on held-out examples, that loss, the head's L2 strength).

    Args:
        features: (examples, width) of each layer; of layers with equal losses the first counts.
        labels: (examples,) classes.
        outputs: number of classes.
        seed: of the folds.
    """
    draws = divisions(SINGLE, labels, 1, seed)
    found = {name: held_out_losses(SINGLE, x, labels, outputs, draws) for name, x in features.items()}
    best = min(found, key=lambda name: float(found[name][0].mean()))
    return best, float(found[best][0].mean()), found[best][1]


def expected_accuracy(
    features: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    outputs: int,
    *,
    examples: int,
    split: tuple[str, int],
    added: Added,
    seed: int,
) -> Expected:
    """The accuracy to expect.

    Args:
        features: (looked at, width) of each layer that the head may learn from.
        labels: (looked at,) classes.
        outputs: number of classes.
        examples: number of training examples of the run.
        split: (name, examples) of what the run is measured on.
        added: what training adds.
        seed: of folds and subsets.
    """
    layer = next(iter(features)) if len(features) == 1 else best_layer(features, labels, outputs, seed)[0]
    curve = measure(features[layer], labels, outputs, _COARSE, seed)
    ahead = forecast(curve, examples, len(labels))
    frozen = _shrunk(1 - ahead.error, len(labels))
    frozen_sd = math.sqrt(ahead.error_sd**2 + curve[-1].spread ** 2 + frozen * (1 - frozen) / len(labels))
    accuracy, low, high = interval(frozen, frozen_sd, added, examples, split[1])
    later = interval(min(frozen + ahead.gain, 1 - 1e-6), frozen_sd, added, 2 * examples, split[1])[0]
    error = _QUANTILE * ahead.gain_sd * accuracy * (1 - accuracy) / (frozen * (1 - frozen))
    return Expected(
        accuracy=accuracy,
        low=low,
        high=high,
        frozen=frozen,
        frozen_sd=frozen_sd,
        gain=later - accuracy,
        gain_low=max(0.0, later - accuracy - error),
        gain_high=later - accuracy + error,
        layer=layer,
        looked_at=len(labels),
        examples=examples,
        split=split[0],
        split_examples=split[1],
        curve=curve,
        measured_with=added.of,
    )


def interval(frozen: float, frozen_sd: float, added: Added, examples: int, tested: int) -> tuple[float, float, float]:
    """(accuracy of a run, low, high), the interval with the probability `COVERAGE`.

    Args:
        frozen: accuracy of a head on frozen features.
        frozen_sd: its standard deviation.
        added: what training adds.
        examples: number of training examples.
        tested: number of examples whose accuracy is counted.
    """
    log_odds = _log_odds(frozen) + added.at(examples)
    accuracy = _probability(log_odds)
    of_frozen = frozen_sd / (frozen * (1 - frozen))  # on the scale of log-odds
    of_test = 1 / (accuracy * (1 - accuracy) * tested)
    width = _QUANTILE * math.sqrt(added.sd**2 + of_frozen**2 + of_test)
    return accuracy, _probability(log_odds - width), _probability(log_odds + width)


def _shrunk(accuracy: float, examples: int) -> float:
    """Away from 0 and 1, which no finite number of examples shows."""
    return min(max(accuracy, 0.5 / (examples + 1)), 1 - 0.5 / (examples + 1))


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def sample_of(order: Array) -> list[int]:
    """The positions to look at, of a stratified order, in ascending order: batches are then read in one go."""
    return sorted(int(i) for i in order[:MOST])
