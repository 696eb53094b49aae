"""Wrong answers and who is taken for whom, from arrays of logits and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax, logit

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION

Array = np.ndarray[Any, Any]


def mistakes(
    problem_type: str, logits: Array, labels: Array, names: Sequence[str], thresholds: Sequence[float] = ()
) -> dict[str, list[Any]]:
    """The wrong answers, those with the highest loss first.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs) logits.
        labels: (examples,) class indices, (examples, classes) of 0 and 1, or (examples,) values.
        names: of the classes.
        thresholds: multi-label classification: the probability above which each label is predicted (default: 0.5).

    Returns:
        Columns: `position` among the examples, `true`, `predicted`, `probability` of the answer, and `loss`
        (cross-entropy in nats). For multi-label classification `true` and `predicted` are lists of names, and
        `probability` is that of the most confident wrong decision. A number is never exactly right: for regression all
        examples, with their squared error as `loss`, and no `probability`.
    """
    wide = np.asarray(logits, dtype=np.float64).reshape(len(labels), -1)
    if problem_type == REGRESSION:
        return _of_numbers(wide[:, 0], np.asarray(labels, dtype=np.float64))
    if problem_type == MULTI_LABEL:
        return _of_several(wide, np.asarray(labels) > 0.5, names, thresholds)
    every, given = log_softmax(wide, axis=-1), np.asarray(labels).astype(np.int64)
    predicted = wide.argmax(-1)
    loss = -every[np.arange(len(given)), given]
    wrong = np.flatnonzero(predicted != given)
    wrong = wrong[np.argsort(-loss[wrong], kind="stable")]
    return {
        "position": wrong.tolist(),
        "true": [names[i] for i in given[wrong]],
        "predicted": [names[i] for i in predicted[wrong]],
        "probability": np.exp(every[wrong, predicted[wrong]]).tolist(),
        "loss": loss[wrong].tolist(),
    }


def _of_numbers(predicted: Array, true: Array) -> dict[str, list[Any]]:
    loss = (predicted - true) ** 2
    order = np.argsort(-loss, kind="stable")
    return {
        "position": order.tolist(),
        "true": true[order].tolist(),
        "predicted": predicted[order].tolist(),
        "loss": loss[order].tolist(),
    }


def _of_several(logits: Array, true: Array, names: Sequence[str], thresholds: Sequence[float]) -> dict[str, list[Any]]:
    chosen = logits > (logit(np.array(thresholds)) if thresholds else 0.0)
    scores = expit(logits)
    confidence = np.where(chosen != true, np.where(chosen, scores, 1 - scores), 0.0).max(axis=-1, initial=0.0)
    loss = np.logaddexp(0.0, np.where(true, -logits, logits)).mean(axis=-1)
    wrong = np.flatnonzero((chosen != true).any(axis=-1))
    wrong = wrong[np.argsort(-loss[wrong], kind="stable")]

    def named(rows: Array) -> list[list[str]]:
        return [[name for name, has in zip(names, row, strict=True) if has] for row in rows]

    return {
        "position": wrong.tolist(),
        "true": named(true[wrong]),
        "predicted": named(chosen[wrong]),
        "probability": confidence[wrong].tolist(),
        "loss": loss[wrong].tolist(),
    }


def confusion_frame(counts: Any, names: Sequence[str]) -> Any:
    """A pandas frame of counts with names: rows true classes, columns predicted ones.

    Args:
        counts: of `metrics.confusion` for single-label classification.
        names: of the classes.
    """
    import pandas

    if isinstance(counts, Mapping):  # many classes: the pairs that occur
        table = np.zeros((len(names), len(names)), dtype=np.int64)
        for true, predicted, count in counts["pairs"]:
            table[true, predicted] = count
    else:
        table = np.array(counts, dtype=np.int64)
    index, columns = (pandas.Index(names, name=axis) for axis in ("true", "predicted"))
    return pandas.DataFrame(table, index=index, columns=columns)
