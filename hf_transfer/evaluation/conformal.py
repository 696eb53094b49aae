"""Split conformal prediction sets: sets of labels that contain the true one with a stated probability.

The score of a label is 1 minus its probability (least ambiguous sets, LAC: Sadinle et al. 2019). The limit is the
ceil((n + 1) * coverage)-th smallest score of the true label among n held-out examples, and the set of an example is
every label whose score is within the limit. If the held-out examples and the new one are exchangeable, the set contains
the true label with at least this probability (Vovk et al. 2005; Angelopoulos and Bates 2021, section 1).

The scores are stored in the model's configuration, so that every copy of the model has them.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np

from hf_transfer.errors import UserError
from hf_transfer.evaluation.calibration import counted
from hf_transfer.evaluation.scores import Array, all_finite, parts

ENTRY = "conformal"  # of the configuration
COVERAGE = 0.9  # default
_MOST = 1000  # scores that are stored
_DIGITS = 6


def record_of(logits: Array, labels: Array) -> dict[str, Any] | None:
    """What a model stores for its sets; None without finite logits of labeled examples.

    Args:
        logits: (examples, classes), held out.
        labels: (examples,) class indices; ignored ones do not count.

    Returns:
        The number of `examples`, and their sorted `scores`, of more than 1,000 those at the ranks of `_ranks`. They are
        rounded up, which makes sets larger, never smaller.
    """
    logits, labels = counted(logits, labels)
    if not len(labels) or not all_finite(logits):
        return None
    scores = np.sort(_true_scores(logits, labels))
    kept = np.ceil(scores[_ranks(len(scores)) - 1] * 10**_DIGITS) / 10**_DIGITS
    return {"examples": len(scores), "scores": kept.round(_DIGITS).tolist()}


def _ranks(count: int) -> Array:
    """The ranks, from 1 to `count`, of the scores that are stored."""
    return np.unique(np.ceil(np.linspace(1, count, min(count, _MOST))).astype(int))


def _true_scores(logits: Array, labels: Array) -> Array:
    """1 minus the probability of the true label, (examples,)."""
    scores = np.empty(len(labels))
    for part in parts(*logits.shape):
        z = logits[part].astype(np.float64)
        z = np.exp(z - z.max(-1, keepdims=True))
        own = np.take_along_axis(z, labels[part, None].astype(int), axis=-1)[:, 0]
        scores[part] = 1 - own / z.sum(-1)
    return scores


def limit_of(record: Any, coverage: float) -> float:
    """The largest score of a label in a set.

    Args:
        record: as `record_of` makes it; None if the model has none.
        coverage: probability that a set contains the true label.

    Raises:
        UserError: `coverage` is not between 0 and 1, the model has no scores, or too few for this coverage.
    """
    if not 0 < coverage < 1:
        raise UserError(f"expected a number above 0 and below 1, got {coverage:g}.", key="coverage")
    if not record:
        raise UserError(
            "the model's config.json holds no scores of validation examples (`conformal`), which the sets are made "
            "from.",
            "Use a model with one label per example that `hf-transfer train` trained with a validation split.",
            key="abstain",
        )
    count, exact = int(record["examples"]), Decimal(str(coverage))  # 0.55 * 100 is not 55 in binary
    rank = math.ceil((count + 1) * exact)
    if rank > count:
        least = math.ceil(exact / (1 - exact))
        raise UserError(
            f"{coverage:g} needs at least {least:,} validation examples, and the run had {count:,}.",
            f"Use at most {math.floor(count / (count + 1) * 1000) / 1000:g}, or train with more validation examples.",
            key="coverage",
        )
    return float(record["scores"][int(np.searchsorted(_ranks(count), rank))])


def in_set(probabilities: Array, limit: float) -> Array:
    """Whether each label is in the set; of the probabilities (..., labels)."""
    members: Array = 1 - probabilities <= limit
    return members
