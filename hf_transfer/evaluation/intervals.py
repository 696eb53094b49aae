"""Confidence intervals of metrics, in memory that grows with the examples and the classes, never with their product.

Resamples are drawn and measured a few at a time, from counts where a metric is a function of counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import ndtri

from hf_transfer.data.labels import MULTI_LABEL, SINGLE_LABEL
from hf_transfer.evaluation import scores
from hf_transfer.evaluation.metric_table import TOP
from hf_transfer.evaluation.scores import Array

BOOTSTRAP_SAMPLES = 1000
SLOW_BOOTSTRAP_SAMPLES = 200  # for metrics that need the examples of each resample
CONFIDENCE = 0.95
_DRAWN = 2**20  # counts that are drawn at a time


def intervals(
    problem_type: str, logits: Array, labels: Array, seed: int = 0, limits: Array | float = 0.0
) -> dict[str, list[float]]:
    """95% confidence interval of each metric.

    Wilson's score interval (Wilson 1927) for accuracies, the percentile bootstrap for all others (Efron and Tibshirani
    1993, chapter 13). The intervals account for the sampling of held-out examples, not for the variation between
    training seeds.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs) logits.
        labels: as in `metrics.compute`.
        seed: seed of the bootstrap.
        limits: as in `metrics.compute`.

    Returns:
        [low, high] by metric.
    """
    rng = np.random.default_rng(seed)
    bounds: dict[str, list[float]] = {}
    if problem_type == SINGLE_LABEL:
        # Without any errors, no bootstrap sample has one, and the interval of the accuracy would be [1, 1].
        correct = logits.argmax(-1) == labels
        bounds["accuracy"] = _wilson(correct.sum(), len(labels))
        if logits.shape[-1] > TOP:
            bounds["top_5_accuracy"] = _wilson(scores.in_top(logits, labels).sum(), len(labels))
        samples = {k: v for k, v in _single_label(rng, logits, labels).items() if k not in bounds}
    elif problem_type == MULTI_LABEL:
        samples = _multi_label(rng, logits, labels, limits)
    else:
        drawn = [scores.regression(logits[i], labels[i]) for i in _resamples(rng, len(labels))]
        samples = {name: np.array([s[name] for s in drawn if name in s]) for name in drawn[0]}
    tail = 100 * (1 - CONFIDENCE) / 2
    quantiles = {name: np.percentile(values, [tail, 100 - tail]) for name, values in samples.items()}
    return bounds | {name: [float(low), float(high)] for name, (low, high) in quantiles.items()}


def class_intervals(hits: int, true: int, predicted: int, count: int, seed: int = 0) -> dict[str, list[float]]:
    """95% confidence intervals of a class's `precision`, `recall` and `f1`, as far as these are defined.

    Wilson's of the two that are fractions, the percentile bootstrap of F1. Resampling examples is a multinomial draw of
    four counts, so that a class takes no more memory than the resamples.

    Args:
        hits: examples of the class that are predicted as such.
        true: examples of the class.
        predicted: predictions of the class.
        count: all examples.
        seed: of the bootstrap.
    """
    bounds: dict[str, list[float]] = {}
    if predicted:
        bounds["precision"] = _wilson(hits, predicted)
    if true:
        bounds["recall"] = _wilson(hits, true)
    if true or predicted:
        cells = np.array([hits, true - hits, predicted - hits, count - true - predicted + hits])
        drawn = np.random.default_rng(seed).multinomial(count, cells / count, BOOTSTRAP_SAMPLES)
        either = 2.0 * drawn[:, 0] + drawn[:, 1] + drawn[:, 2]
        tail = 100 * (1 - CONFIDENCE) / 2
        f1 = 2.0 * drawn[either > 0, 0] / either[either > 0]
        bounds["f1"] = np.percentile(f1, [tail, 100 - tail]).tolist()
    return bounds


def _wilson(hits: Any, count: int) -> list[float]:
    z = float(ndtri((1 + CONFIDENCE) / 2))
    rate, total = int(hits) / count, count + z**2
    middle, half = (rate * count + z**2 / 2) / total, z * (rate * (1 - rate) * count + z**2 / 4) ** 0.5 / total
    low = 0.0 if hits == 0 else middle - half
    return [low, 1.0 if hits == count else middle + half]


def _resamples(rng: np.random.Generator, count: int) -> Iterator[Array]:
    """Indices of the examples of each resample."""
    for _ in range(SLOW_BOOTSTRAP_SAMPLES):
        yield rng.integers(0, count, count)


def _single_label(rng: np.random.Generator, logits: Array, labels: Array) -> dict[str, Array]:
    """(resamples,) values by metric.

    Resampling examples is equivalent to a multinomial draw over the pairs (true, predicted) that occur, of which there
    are at most as many as examples; metrics are functions of the counts per class.
    """
    predicted, classes = logits.argmax(-1), logits.shape[-1]
    pairs, occurrences = np.unique(labels.astype(np.int64) * classes + predicted, return_counts=True)
    if pairs[-1] != classes**2 - 1:  # numpy gives the last outcome what is left: no other pair may be last
        pairs, occurrences = np.append(pairs, classes**2 - 1), np.append(occurrences, 0)
    true, guessed = pairs // classes, pairs % classes
    by_class = [
        _adds_up(true, true == guessed, classes),
        _adds_up(true, None, classes),
        _adds_up(guessed, None, classes),
    ]
    step = max(1, _DRAWN // max(len(pairs), classes))
    values: list[dict[str, Array]] = []
    for start in range(0, BOOTSTRAP_SAMPLES, step):
        size = min(step, BOOTSTRAP_SAMPLES - start)
        draws = rng.multinomial(len(labels), occurrences / len(labels), size)
        values.append(scores.from_counts(*(np.ascontiguousarray((m @ draws.T).T) for m in by_class)))
    samples = {name: np.concatenate([v[name] for v in values]) for name in values[0]}
    certainty, correct = scores.confidence(logits), (predicted == labels).astype(float)
    samples["ece"] = np.array(
        [scores.calibration_error(certainty[i], correct[i]) for i in _resamples(rng, len(labels))]
    )
    return samples


def _adds_up(classes_of: Array, kept: Array | None, classes: int) -> Any:
    """(classes, pairs) sparse matrix that adds the counts of pairs up by class, or only of those that are `kept`."""
    weights = np.ones(len(classes_of), int) if kept is None else kept.astype(int)
    return sparse.csr_array((weights, (classes_of, np.arange(len(classes_of)))), shape=(classes, len(classes_of)))


# ---- several labels ------------------------------------------------------------------------------------------------


def _multi_label(rng: np.random.Generator, logits: Array, labels: Array, limits: Array | float) -> dict[str, Array]:
    """(resamples,) values by metric, from how often each example is in each resample."""
    drawn = np.empty((len(labels), SLOW_BOOTSTRAP_SAMPLES), np.int32)
    for i, indices in enumerate(_resamples(rng, len(labels))):
        drawn[:, i] = np.bincount(indices, minlength=len(labels))
    counts = np.zeros((3, SLOW_BOOTSTRAP_SAMPLES, logits.shape[-1]))
    for part in scores.parts(*logits.shape):
        predicted, true = logits[part] > limits, labels[part] > 0
        weights = drawn[part].T.astype(np.float32)  # exact: a part has few examples
        counts += [weights @ marks.astype(np.float32) for marks in (predicted & true, true, predicted)]
    exact = drawn.T.astype(np.float64) @ scores.exact_matches(logits, labels, limits) / len(labels)
    samples = scores.from_label_counts(counts[0], counts[1], counts[2], exact)
    if not scores.all_finite(logits):
        return samples
    total, defined = np.zeros(SLOW_BOOTSTRAP_SAMPLES), np.zeros(SLOW_BOOTSTRAP_SAMPLES)
    for z, y in scores.columns(logits, labels):
        if y.any():
            precision, positives = _average_precisions(z, y, drawn)
            total, defined = total + precision, defined + (positives > 0)
    if defined.any():
        samples["map"] = total[defined > 0] / defined[defined > 0]
    return samples


def _average_precisions(logits: Array, positive: Array, drawn: Array) -> tuple[Array, Array]:
    """`scores.average_precision` of each resample, 0 without positives; and its number of positives.

    Args:
        logits: (examples,).
        positive: (examples,) of bool.
        drawn: (examples, resamples) how often an example is drawn.
    """
    order = np.argsort(-logits)
    z, mine = logits[order], np.flatnonzero(positive[order])
    # The examples at least as high as a positive are counted where its ties end; positives that tie share that count.
    ends, first = np.unique(np.searchsorted(-z, -z[mine], side="right"), return_index=True)
    above = _sums(order, ends, drawn).cumsum(0)
    own = _sums(order[mine], np.append(first[1:], len(mine)), drawn)
    hits, positives = own.cumsum(0), own.sum(0)
    precision = np.divide(hits, above, out=np.zeros(hits.shape), where=above > 0)
    return (own * precision).sum(0) / np.maximum(positives, 1), positives


def _sums(rows: Array, ends: Array, counts: Array) -> Array:
    """Sums of the `counts` of consecutive `rows`, up to each end: (ends, resamples)."""
    ones, starts = np.ones(ends[-1], counts.dtype), np.append(0, ends)
    return sparse.csr_array((ones, rows[: ends[-1]], starts), shape=(len(ends), len(counts))) @ counts
