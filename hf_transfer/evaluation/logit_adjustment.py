"""Offsets of a single-label classifier's logits, for metrics in which a rare class counts as much as a frequent one.

The most probable class is the best answer where every example counts alike. Where every class does, logits minus
τ log π are (Menon et al. 2021, "Long-tail learning via logit adjustment", section 4.1), with π the prior of a class and
τ = 1 for balanced accuracy. Here τ is chosen on held-out examples, one for all classes: an offset of its own for each
class would be fitted to the few examples of the rare ones. π is the mean probability that the model itself gives a
class there, so that what class weights or balanced sampling have corrected is not corrected again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import softmax

from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.calibration import counted
from hf_transfer.evaluation.scores import Array

STRENGTHS = tuple(i / 20 for i in range(41))  # of τ: 0 … 2


@dataclass(frozen=True)
class LogitAdjustment:
    """What was chosen.

    Attributes:
        metric: that it was chosen by.
        strength: τ; 0 if no other has a higher metric.
        offsets: (classes,) to be added to the logits; their mean is 0.
        examples: it was chosen on.
        before: the metric on them without the offsets.
        after: likewise, with them.
    """

    metric: str
    strength: float
    offsets: tuple[float, ...]
    examples: int
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return asdict(self) | {"offsets": list(self.offsets)}


def describe(adjustment: Mapping[str, Any]) -> str:
    """An adjustment, as `results.json` holds it, for display."""
    metric, before, after = adjustment["metric"], adjustment["before"], adjustment["after"]
    if not adjustment["strength"]:
        return f"none: no strength has a higher {metric} than {before:.4f} on the validation split"
    return (
        f"strength {adjustment['strength']:.2f}, chosen on {adjustment['examples']:,} validation examples (there, "
        f"{metric} {before:.4f} → {after:.4f})"
    )


def choose_offsets(logits: Array, labels: Array, metric: str) -> LogitAdjustment:
    """The offsets with the highest metric on held-out examples.

    A metric moves in steps, and several strengths share its highest value: it is the middle of the longest row of them,
    where a few other examples change least.

    Args:
        logits: (examples, classes), calibrated if they are to be.
        labels: (examples,) class indices, of which `IGNORED` does not count.
        metric: `f1_macro` or `recall_macro`, which is the balanced accuracy.

    Raises:
        ValueError: no example counts.
        WorkFailed: a logit is NaN or infinite.
    """
    logits, labels = counted(logits, labels)
    if not len(labels):
        raise ValueError("offsets need examples")
    if not scores.all_finite(logits):
        raise WorkFailed("Logit adjustment: the model's validation logits contain NaN or infinite values.")
    logits = logits.astype(np.float64)
    size = logits.shape[1]
    prior = np.log((softmax(logits, axis=1).sum(0) + 1) / (len(logits) + size))  # as if each class had one more
    prior -= prior.mean()
    values = np.array([_value(logits - strength * prior, labels, metric) for strength in STRENGTHS])
    best = _middle_of_longest(values == values.max())
    strength = STRENGTHS[best] if values[best] > values[0] else 0.0
    offsets = tuple((-strength * prior).tolist()) if strength else (0.0,) * size
    return LogitAdjustment(metric, strength, offsets, len(labels), float(values[0]), float(values.max()))


def _value(logits: Array, labels: Array, metric: str) -> float:
    counts = scores.class_counts(labels, logits.argmax(1), logits.shape[1])
    return float(scores.from_counts(*counts)[metric])


def _middle_of_longest(marked: Array) -> int:
    """Index of the middle of the first longest row of marked places."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(int)))
    begins, ends = edges[::2], edges[1::2]
    longest = int((ends - begins).argmax())
    return int((begins[longest] + ends[longest] - 1) // 2)
