"""The training examples that the frozen model sees as most like others: what a wrong answer may have been learned from.

Similarity is the cosine of the features, as in nearest-neighbor explanations of a classifier (Papernot & McDaniel 2018,
"Deep k-Nearest Neighbors"); here of the pretrained model, which no label has drawn together yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

_AT_ONCE = 1024  # examples whose similarities are held in memory at a time


@dataclass(frozen=True)
class Neighbors:
    """The training examples most like each of some others, the most similar first.

    Attributes:
        rows: (examples, neighbors) positions in the training split.
        cosines: (examples, neighbors) similarities, -1 to 1.
    """

    rows: torch.Tensor
    cosines: torch.Tensor


def nearest_of(train: torch.Tensor, others: torch.Tensor, count: int) -> Neighbors:
    """The nearest training examples of each other example; of equally similar ones, the first.

    Args:
        train: (training examples, width) features.
        others: (examples, width) features.
        count: of neighbors, at most as many as there are training examples.
    """
    known, count = functional.normalize(train.float(), dim=1), min(count, len(train))
    rows, cosines = [], []
    for part in functional.normalize(others.float(), dim=1).split(_AT_ONCE):
        similar = part @ known.T
        order = similar.argsort(dim=1, descending=True, stable=True)[:, :count]
        rows.append(order)
        cosines.append(similar.gather(1, order))
    return Neighbors(torch.cat(rows), torch.cat(cosines))
