"""How well a classifier does on a target domain without labels: scores by which adapted models are compared.

None of them measures the accuracy. They say which of several models on the same source and target is likely to be
better, and can be wrong: a model that is sure of wrong answers on a balanced target looks well to all but the second.

- `information`: the mutual information of inputs and answers on the target (Bridle et al. 1991; Shi and Sha 2012,
  equation 4): the answers are sure one by one (`entropy`), and divided among the classes as a whole. Next to it stands
  the accuracy on the source's validation split, which must not fall.
- `deep_embedded`: the loss on the source's validation split, weighted by how much each example looks like one of the
  target, with a control variate (You et al. 2019).
- `neighborhood_density`: whether each target example has near neighbors with the same answer (Saito et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp

Array = Any  # np.ndarray
INFORMATION, DEEP_EMBEDDED, DENSITY = "information", "deep_embedded", "neighborhood_density"
TEMPERATURE = 0.05  # Saito et al. 2021, section 3.2
_ROWS = 512  # of a similarity matrix at a time


@dataclass(frozen=True)
class Scores:
    """What is known of a model without labels of the target.

    Attributes:
        information: in nats, from 0 to the logarithm of the number of classes; higher is better.
        entropy: the mean of the single answers', in nats; the entropy of the mean answer is the sum of both.
        deep_embedded: estimated loss on the target; lower is better. None where features cannot be read.
        neighborhood_density: higher is better; None for fewer than 3 examples.
        source_accuracy: on the source's validation split.
        source_error: its standard error.
    """

    information: float
    entropy: float
    deep_embedded: float | None
    neighborhood_density: float | None
    source_accuracy: float
    source_error: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)

    @property
    def spread(self) -> float:
        """The entropy of the mean answer, in nats: how evenly the answers are divided among the classes."""
        return self.information + self.entropy

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Scores:
        """From what `to_dict` gave, also from JSON, which has no NaN."""
        of_target = {name: math.nan for name in ("information", "entropy") if values[name] is None}
        return cls(**{**values, **of_target})


def information(logits: Array) -> float:
    """H(mean of p) - mean of H(p), in nats, of the probabilities p that a classifier gives to examples.

    Args:
        logits: (examples, classes).
    """
    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    mean = logsumexp(log_p, axis=0) - np.log(len(log_p))
    return float((np.exp(log_p) * log_p).sum(1).mean() - (np.exp(mean) * mean).sum())


def entropy(logits: Array) -> float:
    """The mean entropy of the answers, in nats; `logits` are (examples, classes)."""
    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return float(-(np.exp(log_p) * log_p).sum(1).mean())


def neighborhood_density(logits: Array, temperature: float = TEMPERATURE) -> float | None:
    """Soft neighborhood density (Saito et al. 2021, equations 2 and 3), in nats; None for fewer than 3 examples.

    The mean entropy of how each example's similarity is divided among the others; the similarity is the cosine of the
    probabilities that the classifier gives.

    Args:
        logits: (examples, classes).
        temperature: of the division.
    """
    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    if len(log_p) < 3:
        return None
    p = np.exp(log_p)
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    total = 0.0
    for start in range(0, len(p), _ROWS):
        similarity = p[start : start + _ROWS] @ p.T / temperature
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf  # not its own neighbor
        shares = log_softmax(similarity, axis=1)
        shares[rows, start + rows] = 0.0  # 0 log 0
        total -= float((np.exp(shares) * shares).sum())
    return total / len(p)


def deep_embedded(losses: Array, weights: Array) -> float:
    """Deep embedded validation (You et al. 2019, algorithm 1): the weighted mean loss with a control variate.

    Args:
        losses: (examples,) of the source's validation split.
        weights: (examples,) density of the target over that of the source; their mean is 1 in expectation, which is
            what the variate uses.
    """
    losses, weights = np.asarray(losses, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    weighted, variance = losses * weights, float(weights.var())
    if not variance:
        return float(weighted.mean())
    slope = -float(((weighted - weighted.mean()) * (weights - weights.mean())).mean()) / variance
    return float(weighted.mean() + slope * weights.mean() - slope)


def density_ratio(source: Array, target: Array, validation: Array, seed: int = 0) -> Array:
    """(examples,) of `validation`: density of the target over that of the source, by a logistic regression.

    Args:
        source: (n, width) features of training examples.
        target: (m, width) features of target examples.
        validation: (examples, width) features of the source's validation split.
        seed: of the solver.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and every run imports this module
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    both = np.concatenate([source, target]).astype(np.float64)
    domain = np.repeat([0, 1], [len(source), len(target)])
    critic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed)).fit(both, domain)
    odds = np.exp(critic.decision_function(np.asarray(validation, dtype=np.float64)))
    return np.asarray(odds * len(source) / len(target))


# ---- the choice ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Which of several models to keep.

    Attributes:
        chosen: its name.
        reasons: why each of the others is not kept, by name.
    """

    chosen: str
    reasons: Mapping[str, str]


def choose(scores: Mapping[str, Scores], alone: str, margin: float, most_loss: float) -> Verdict:
    """The model with the most information; the one named `alone` unless another is better by the margin.

    It must not be worse in either part of it. A model that is only surer is not better: training on its own answers
    makes any model surer. Nor is one whose answers are mostly divided among the classes more evenly: aligning domains
    in which the classes are differently frequent does that, and the answers get less sure by more than is gained.

    Args:
        scores: by name; without those of models that failed, and with that of `alone`.
        alone: the model that was trained on the source alone.
        margin: by which the information must be higher, in nats.
        most_loss: by which the accuracy on the source's validation split may be lower, beyond a standard error.
    """
    own, reasons, able = scores[alone], dict[str, str](), dict[str, float]()
    for name, score in scores.items():
        if name == alone:
            continue
        lost = own.source_accuracy - score.source_accuracy
        if not np.isfinite(score.information):
            reasons[name] = "its answers on the target are NaN or infinite"
        elif lost > most_loss + own.source_error:
            reasons[name] = f"its accuracy on the source's validation split is {lost:.3f} lower"
        elif (gain := score.information - own.information) <= margin:
            reasons[name] = f"its gain of information on the target, {gain:+.3f}, is not above {margin:g}"
        elif score.spread < own.spread:
            reasons[name] = "its answers are only surer, and divided among the classes less evenly"
        elif score.entropy - own.entropy > gain:
            reasons[name] = "its answers are divided among the classes more evenly, but less sure"
        else:
            able[name] = score.information
    chosen = max(able, key=able.__getitem__) if able else alone
    for name in able:
        if name != chosen:
            reasons[name] = f"{chosen} has more information on the target"
    if chosen != alone:
        reasons[alone] = f"{chosen} has {able[chosen] - own.information:.3f} more information on the target"
    return Verdict(chosen, reasons)
