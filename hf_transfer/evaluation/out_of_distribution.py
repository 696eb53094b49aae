"""How unlike the training examples an input is, and how well that tells two sets of inputs apart.

Every score is higher for what is less like the training examples. `energy` reads the logits alone: the negative
log-sum-exp (Liu et al. 2020, equation 4), for several labels the sum over them (Wang et al. 2021, equation 6). The
others are distances between the vectors that the head reads: `neighbors`, to the tenth nearest training example, after
normalization (Sun et al. 2022, section 3), and `mahalanobis`, the squared distance to the nearest class mean under one
covariance for all classes (Lee et al. 2018, equation 2), which is shrunk (Ledoit and Wolf 2004), so that it can be
inverted with fewer examples than features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg
from scipy.special import logsumexp

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation.intervals import CONFIDENCE, SLOW_BOOTSTRAP_SAMPLES
from hf_transfer.evaluation.scores import Array, all_finite, parts

NEAREST = 10  # the neighbor whose distance counts
FEWEST = 2  # training examples
_ACCEPTED = 0.95  # of the inputs inside, where the false positive rate is taken


def energy(problem_type: str, logits: Array) -> Array | None:
    """(inputs,) energies of their logits (inputs, outputs); None for regression."""
    if problem_type == REGRESSION:
        return None
    found = np.empty(len(logits))
    for part in parts(*logits.shape):
        z = logits[part].astype(np.float64)
        found[part] = -(np.logaddexp(0.0, z).sum(-1) if problem_type == MULTI_LABEL else logsumexp(z, axis=-1))
    return found


@dataclass(frozen=True)
class Reference:
    """The training examples that inputs are compared with.

    Attributes:
        directions: (examples, width) normalized features.
        root: (width, width) lower triangle of the Cholesky factor of the covariance within classes.
        means: (classes, width) of the classes that have examples.
    """

    directions: Array
    root: Array
    means: Array

    @classmethod
    def of(cls, features: Array, classes: Array | None) -> Reference:
        """Of training examples.

        Args:
            features: (examples, width), at least two examples.
            classes: (examples,) class indices; None for a model without classes of which one is right, whose training
                examples have one mean.

        Raises:
            WorkFailed: a feature is NaN or infinite.
        """
        from sklearn.covariance import ledoit_wolf  # slow to import

        _check_finite(features, "The model's features of the training examples")
        wide = features.astype(np.float64)
        _, own = np.unique(np.zeros(len(wide)) if classes is None else classes, return_inverse=True)
        sums = np.zeros((own.max() + 1, wide.shape[1]))
        np.add.at(sums, own, wide)
        means = sums / np.bincount(own)[:, None]
        covariance, _ = ledoit_wolf(wide - means[own], assume_centered=True)
        least = max(np.trace(covariance) / len(covariance), 1e-12) * 1e-9  # all examples of a class may be equal
        root = linalg.cholesky(covariance + least * np.eye(len(covariance)), lower=True)
        return cls(_normalized(wide), root, means)

    def neighbors(self, features: Array) -> Array:
        """(inputs,) distances to the `NEAREST`-th nearest training example, to the last if there are fewer."""
        k = min(NEAREST, len(self.directions))
        found = np.empty(len(features))
        for part in parts(len(features), max(self.directions.shape)):
            cosines = _normalized(features[part].astype(np.float64)) @ self.directions.T
            nearest = np.partition(cosines, len(self.directions) - k, axis=-1)[:, len(self.directions) - k]
            found[part] = np.sqrt(np.maximum(2 - 2 * nearest, 0))
        return found

    def mahalanobis(self, features: Array) -> Array:
        """(inputs,) squared distances to the nearest class mean."""

        def whitened(rows: Array) -> Array:
            white: Array = linalg.solve_triangular(self.root, rows.T.astype(np.float64), lower=True).T
            return white

        means, found = whitened(self.means), np.empty(len(features))
        for part in parts(len(features), max(self.root.shape[0], len(means))):
            white = whitened(features[part])
            squared = np.square(white).sum(-1)[:, None] + np.square(means).sum(-1) - 2 * white @ means.T
            found[part] = np.maximum(squared.min(-1), 0)
        return found


def scores_of(
    problem_type: str, logits: Array, features: Array | None, reference: Reference | None
) -> dict[str, Array]:
    """(inputs,) values of every score that can be computed, by name.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (inputs, outputs).
        features: (inputs, width) that the head reads; None if they are not known.
        reference: the training examples, None likewise.

    Raises:
        WorkFailed: a logit or feature is NaN or infinite.
    """
    _check_finite(logits, "The model's logits")
    found: dict[str, Array] = {}
    if (energies := energy(problem_type, logits)) is not None:
        found["energy"] = energies
    if features is not None and reference is not None:
        _check_finite(features, "The model's features")
        found |= {"neighbors": reference.neighbors(features), "mahalanobis": reference.mahalanobis(features)}
    return found


def classes_of(problem_type: str, labels: Array) -> Array | None:
    """What `Reference.of` takes as classes."""
    return labels if problem_type == SINGLE_LABEL else None


def separation(inside: Array, outside: Array, seed: int = 0) -> dict[str, Any]:
    """How well a score tells inputs outside from those inside.

    Args:
        inside: (inputs,) scores of examples like the training examples.
        outside: (inputs,) scores of others.
        seed: of the bootstrap.

    Returns:
        `auroc`, as scikit-learn's `roc_auc_score` with outside as the positive class; its 95% `interval`, the
        percentile bootstrap over the inputs of both sets; and `fpr95`, the fraction of the inputs outside that are
        accepted by the threshold that accepts 95% of those inside.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        _auroc(rng.choice(inside, len(inside)), rng.choice(outside, len(outside)))
        for _ in range(SLOW_BOOTSTRAP_SAMPLES)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    threshold = np.quantile(inside, _ACCEPTED, method="higher")
    return {
        "auroc": _auroc(inside, outside),
        "interval": np.percentile(drawn, [tail, 100 - tail]).tolist(),
        "fpr95": float((outside <= threshold).mean()),
    }


def _auroc(inside: Array, outside: Array) -> float:
    """The probability that an input outside has the higher score, ties counting half."""
    ordered = np.sort(inside)
    below = np.searchsorted(ordered, outside, side="left") + np.searchsorted(ordered, outside, side="right")
    return float(below.mean() / (2 * len(inside)))


def _normalized(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _check_finite(values: Array, what: str) -> None:
    if not all_finite(values):
        raise WorkFailed(f"{what} contain NaN or infinite values, so that no out-of-distribution score is defined.")
