"""Labels that look wrong: confident learning on out-of-fold probabilities of a linear head on frozen features.

An example's score and whether its label counts as wrong come from cleanlab (Northcutt et al. 2021, "Confident learning:
estimating uncertainty in dataset labels"). What is added is what the probabilities are made of: the two layers whose
features predict held-out labels best, convex heads, and repeated folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_transfer.analysis.out_of_fold import REPEATS, OutOfFold, out_of_fold
from hf_transfer.errors import UserError
from hf_transfer.features import FrozenFeatures
from hf_transfer.features.convex_head import MULTI, SINGLE, STRENGTHS
from hf_transfer.features.cross_validation import FOLDS, strata
from hf_transfer.features.layouts import MEAN
from hf_transfer.layers.architectures import HEAD

# cleanlab's score of an example. Of its three, with and without the adjustment for the confidence in each class, this
# one found most of the labels that were flipped on purpose (`benchmarks/label_issues.py`).
METHOD, ADJUST = "normalized_margin", True
# A label below this out-of-fold probability looks wrong. cleanlab's estimate of how many are wrong is far too high
# where the head knows little (with 2% wrong labels, one in 20 of those it names): what only it names is doubtful.
IMPROBABLE = 0.1
_FEW = 5_000  # more examples have their folds drawn once
_MOST_LAYERS = 8
_BEST = 2  # layers whose probabilities are averaged
_SAMPLE = 500  # examples that layers are chosen with
_CLEAR = 300  # with as many, one draw of few folds shows which layers are best
_COARSE = STRENGTHS[2:10:2]  # strengths that they are chosen with: 10 … 0.01

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LabelIssue:
    """An example whose label looks wrong, or is doubtful.

    Attributes:
        row: of the example.
        given: classes that it is labeled with: one, or any number of several.
        suggested: classes that it seems to have.
        probability: out-of-fold probability of the label; of several the least one.
        score: cleanlab's, 0 to 1, the lower the likelier the label is wrong.
    """

    row: int
    given: tuple[int, ...]
    suggested: tuple[int, ...]
    probability: float
    score: float

    @property
    def looks_wrong(self) -> bool:
        """Whether the label is improbable; else it is doubtful."""
        return self.probability < IMPROBABLE


@dataclass(frozen=True)
class Judgment:
    """What is said of the labels of a dataset.

    Attributes:
        issues: examples whose label looks wrong, the likeliest first, and after them those whose label is doubtful.
        scores: (examples,) 0 to 1, the lower the likelier the label is wrong; NaN for examples that are left out.
        left_out: number of examples whose label cannot be judged, because no other example has their class.
        classes_left_out: number of classes that cannot be judged, because fewer than two examples have or lack them.
        l2: strength of the heads' penalty, for each matrix of features.
        agreement: fraction of the labels that out-of-fold predictions agree with.
    """

    issues: tuple[LabelIssue, ...]
    scores: Array
    left_out: int
    classes_left_out: int
    l2: tuple[float, ...]
    agreement: float


def judge_features(features: FrozenFeatures, labels: torch.Tensor, seed: int = 0) -> tuple[Judgment, tuple[str, ...]]:
    """(what is said of the labels, layer groups) with the features that predict held-out labels best.

    These are the means of the outputs of two layers, or the input of the head: one token, where it reads only one.

    Args:
        features: pooled by `mean`, of any layers.
        labels: (examples,) classes, or (examples, classes) of 0 and 1.
        seed: of the folds.

    Raises:
        UserError: there is nothing to compare labels with: fewer than two classes have two examples.
    """
    l2 = _best(features, labels, seed)
    start = max(STRENGTHS.index(max(l2.values())) - 1, 0)
    return judge([_matrix(features, layer) for layer in l2], labels, seed, STRENGTHS[start:]), tuple(l2)


def _matrix(features: FrozenFeatures, layer: str) -> torch.Tensor:
    return features.matrix(layer, None if layer == HEAD else MEAN)


def layers_to_compare(groups: Sequence[str]) -> list[str]:
    """The layer groups to choose from: some evenly spaced ones with the last before the head, and the head's input."""
    backbone = [name for name in groups if name != HEAD]
    places = np.linspace(0, len(backbone) - 1, min(_MOST_LAYERS, len(backbone))).round().astype(int)
    return [*(backbone[i] for i in places), *(name for name in groups if name == HEAD)]


def _best(features: FrozenFeatures, labels: torch.Tensor, seed: int) -> dict[str, float]:
    """{layer group: L2 strength} with the least out-of-fold log-loss on a sample that is balanced by class."""
    rows, _, encoded = _judgeable(labels)
    kind = SINGLE if labels.dim() == 1 else MULTI
    order = _by_turns(strata(kind, encoded), seed)[: max(_SAMPLE, 2 * len(encoded.unique()))]
    kept, _, sample = _judgeable(encoded[order])
    rows = rows[order][kept]
    folds, repeats = (3, 1) if len(rows) > _CLEAR else (FOLDS, REPEATS)

    def found(layer: str) -> OutOfFold:
        x = _matrix(features, layer)[rows]
        return out_of_fold(x, sample, folds=folds, repeats=repeats, strengths=_COARSE, seed=seed)

    by_layer = {layer: found(layer) for layer in layers_to_compare(features.groups)}
    best = sorted(by_layer, key=lambda layer: by_layer[layer].loss)[:_BEST]
    return {layer: by_layer[layer].l2 for layer in best}


def _by_turns(stratum: Array, seed: int) -> Array:
    """All positions: one of each stratum, then another of each, and so on; within a stratum in random order."""
    order = np.random.default_rng(seed).permutation(len(stratum))
    turn = np.empty(len(order), dtype=int)
    for value in np.unique(stratum):
        members = order[stratum[order] == value]
        turn[members] = np.arange(len(members))
    return order[np.argsort(turn[order], kind="stable")]


def judge(
    features: Sequence[torch.Tensor], labels: torch.Tensor, seed: int = 0, strengths: Sequence[float] = STRENGTHS
) -> Judgment:
    """What is said of the labels of examples.

    Args:
        features: matrices (examples, width); the probabilities that each of them gives are averaged.
        labels: (examples,) classes, or (examples, classes) of 0 and 1.
        seed: of the folds.
        strengths: of the heads' L2 penalty, from strong to weak.

    Raises:
        UserError: there is nothing to compare labels with: fewer than two classes have two examples.
    """
    rows, classes, encoded = _judgeable(labels)
    repeats = REPEATS if len(rows) <= _FEW else 1
    found = [out_of_fold(x[rows], encoded, repeats=repeats, strengths=strengths, seed=seed) for x in features]
    probabilities = np.mean([one.probabilities for one in found], axis=0)
    judge_rows = _one_label if labels.dim() == 1 else _several_labels
    scores, suggested, of_label = judge_rows(encoded.numpy(), probabilities)
    every = np.full(len(labels), np.nan)
    every[rows] = scores
    issues = []
    for i, names in suggested.items():
        given = labels[rows[i]]
        own = (int(given),) if labels.dim() == 1 else tuple(given.nonzero()[:, 0].tolist())
        unjudged = () if labels.dim() == 1 else tuple(c for c in own if c not in classes)
        right = (*classes[list(names)].tolist(), *unjudged)
        issues.append(LabelIssue(int(rows[i]), own, right, float(of_label[i]), float(scores[i])))
    return Judgment(
        issues=tuple(sorted(issues, key=lambda issue: (not issue.looks_wrong, issue.score, issue.row))),
        scores=every,
        left_out=len(labels) - len(rows),
        classes_left_out=(len(labels.unique()) if labels.dim() == 1 else labels.shape[1]) - len(classes),
        l2=tuple(one.l2 for one in found),
        agreement=_agreement(encoded.numpy(), probabilities),
    )


def _agreement(labels: Array, probabilities: Array) -> float:
    predicted = probabilities.argmax(1) if labels.ndim == 1 else probabilities > 0.5
    return float((predicted == labels).mean())


def _judgeable(labels: torch.Tensor) -> tuple[Array, Array, torch.Tensor]:
    """(rows, classes, labels of these rows among these classes) that heads can be solved for without a row.

    Raises:
        UserError: there are none.
    """
    values = labels.numpy()
    if labels.dim() == 1:
        names, counts = np.unique(values, return_counts=True)
        classes = names[counts >= 2]
        rows = np.flatnonzero(np.isin(values, classes))
        encoded = np.searchsorted(classes, values[rows])
    else:
        positive = values.sum(0)
        classes = np.flatnonzero((positive >= 2) & (len(values) - positive >= 2))
        rows, encoded = np.arange(len(values)), values[:, classes]
    if len(classes) < (2 if labels.dim() == 1 else 1):
        raise UserError(
            "Labels can only be compared where two classes have at least two examples each.", "Add examples."
        )
    return rows, classes, torch.from_numpy(encoded)


# ---- cleanlab --------------------------------------------------------------------------------------------------------


def _one_label(labels: Array, probabilities: Array) -> tuple[Array, dict[int, tuple[int, ...]], Array]:
    """((examples,) scores, {position of an issue: suggested class}, (examples,) probability of the label).

    Issues are as many labels as cleanlab estimates to be wrong, those with the lowest scores, and improbable labels; as
    far as another class is more probable.

    Args:
        labels: (examples,)
        probabilities: (examples, classes)
    """
    from cleanlab.count import num_label_issues  # slow to import, as all of cleanlab
    from cleanlab.rank import get_label_quality_scores

    scores = get_label_quality_scores(labels, probabilities, method=METHOD, adjust_pred_probs=ADJUST)
    likeliest, of_label = probabilities.argmax(1), probabilities[np.arange(len(labels)), labels]
    others = likeliest != labels
    lowest = np.lexsort((np.arange(len(labels)), scores, ~others))[: num_label_issues(labels, probabilities)]
    issues = others & (np.isin(np.arange(len(labels)), lowest) | (of_label < IMPROBABLE))
    return scores, {int(i): (int(likeliest[i]),) for i in np.flatnonzero(issues)}, of_label


def _several_labels(labels: Array, probabilities: Array) -> tuple[Array, dict[int, tuple[int, ...]], Array]:
    """The same for any number of classes per example, each of which is judged alone: (examples, classes) twice.

    The probability is the least one of what an example's label says about a class.
    """
    from cleanlab.multilabel_classification import get_label_quality_scores
    from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class

    positive = labels.astype(bool)
    rows = [np.flatnonzero(row).tolist() for row in positive]
    scores = get_label_quality_scores(rows, probabilities, method=METHOD)
    of_label = np.where(positive, probabilities, 1 - probabilities)
    wrong = find_multilabel_issues_per_class(rows, probabilities, filter_by=f"low_{METHOD}", n_jobs=1)
    right = positive ^ ((wrong & (of_label < 0.5)) | (of_label < IMPROBABLE))
    issues = np.flatnonzero((right != positive).any(1))
    return scores, {int(i): tuple(np.flatnonzero(right[i]).tolist()) for i in issues}, of_label.min(1)
