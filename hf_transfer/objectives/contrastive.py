"""The supervised contrastive loss, and batches in which examples have others of their class."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

TEMPERATURE = 0.1  # Khosla et al. 2020, section 4


def supervised_contrastive(
    vectors: torch.Tensor, labels: torch.Tensor, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """How unlike examples of one class are, compared with all others of the batch (Khosla et al. 2020, equation 2).

    The mean over anchors i of -1/|P(i)| * sum over p in P(i) of log(exp(z_i.z_p / T) / sum over a != i of
    exp(z_i.z_a / T)), where z are the vectors at length 1 and P(i) are the others that share a label with i. An example
    that shares its labels with no other is no anchor, and one that others are compared with all the same.

    Args:
        vectors: (examples, width), of any length.
        labels: (examples,) classes, or (examples, labels) of 0 and 1.
        temperature: T.

    Returns:
        A scalar; 0, with a gradient of 0, for a batch in which no two examples share a label.
    """
    unit = functional.normalize(vectors.float(), dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    similar = (unit @ unit.T / temperature).masked_fill(itself, -math.inf)
    logs = (similar - similar.logsumexp(1, keepdim=True)).masked_fill(itself, 0.0)
    shared = labels[:, None] == labels[None] if labels.ndim == 1 else labels.float() @ labels.float().T > 0
    positives = shared.to(unit.device) & ~itself
    counts = positives.sum(1)
    anchors = counts > 0
    each = -(logs * positives).sum(1) / counts.clamp(min=1)
    return each[anchors].sum() / anchors.sum().clamp(min=1)


def paired_batches(labels: torch.Tensor, size: int, rng: np.random.Generator) -> list[list[int]]:
    """One epoch: the numbers of all examples, each once, in `batches_per_epoch` batches of about equal size.

    Two examples of a class are drawn together, so that with any number of classes nearly every example finds another
    of its own. Examples with several labels are drawn one by one.

    Args:
        labels: (examples,) classes, or (examples, labels).
        size: of a batch; there may be one example more.
        rng: draws the order.
    """
    if labels.ndim > 1:
        drawn = [[int(i)] for i in rng.permutation(len(labels))]
    else:
        pairs = list[list[int]]()
        for one in labels.unique():
            own = rng.permutation((labels == one).nonzero()[:, 0].numpy()).tolist()
            pairs += [own[i : i + 2] for i in range(0, len(own), 2)]
        drawn = [pairs[i] for i in rng.permutation(len(pairs))]
    batches: list[list[int]] = [[] for _ in range(batches_per_epoch(len(labels), size))]
    begin = 0
    for together in drawn:
        batches[begin * len(batches) // len(labels)] += together
        begin += len(together)
    return batches


def batches_per_epoch(count: int, size: int) -> int:
    """The number of batches of `count` examples, each of at most about `size`."""
    return math.ceil(count / size)
