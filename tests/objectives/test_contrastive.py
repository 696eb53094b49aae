"""The supervised contrastive loss against its formula in loops, and the batches that it is computed on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_transfer.objectives.contrastive import batches_per_epoch, paired_batches, supervised_contrastive


def by_loops(vectors, labels, temperature):
    """Khosla et al. 2020, equation 2, as it is written; the mean over the anchors that have positives."""
    z = [v / v.norm() for v in vectors.double()]
    shares = lambda i, j: bool((labels[i] * labels[j]).any()) if labels.ndim > 1 else labels[i] == labels[j]  # noqa: E731
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if shares(i, p)]
        if not positives:
            continue
        below = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        terms = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / below) for p in positives]
        losses.append(-sum(terms) / len(positives))
    return sum(losses) / len(losses)


CLASSES = torch.tensor([0, 1, 1, 0, 2, 1, 3, 0])  # 2 and 3 stand alone
SEVERAL = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 1], [1, 0, 1]])


@pytest.mark.parametrize("labels", [CLASSES, SEVERAL, SEVERAL.float()])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_the_loss_is_the_papers(labels, temperature):
    vectors = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) * 7
    loss = supervised_contrastive(vectors, labels, temperature)
    assert float(loss) == pytest.approx(by_loops(vectors, labels, temperature), rel=1e-5)
    assert float(supervised_contrastive(vectors * 3, labels, temperature)) == pytest.approx(float(loss), rel=1e-5)


def test_without_positives_there_is_nothing_to_learn_and_no_nan():
    vectors = torch.randn(4, 3, requires_grad=True)
    loss = supervised_contrastive(vectors, torch.arange(4))
    loss.backward()
    assert float(loss.detach()) == 0.0 and not vectors.grad.any()


def test_the_gradient_is_finite_and_draws_a_class_together():
    vectors = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    supervised_contrastive(vectors, CLASSES).backward()
    assert vectors.grad.isfinite().all()
    nearer = torch.nn.functional.cosine_similarity
    with torch.no_grad():
        moved = vectors - 0.1 * vectors.grad
    assert nearer(moved[0], moved[3], dim=0) > nearer(vectors[0], vectors[3], dim=0)


@pytest.mark.parametrize(("count", "size"), [(7, 32), (32, 32), (33, 32), (101, 8), (40, 6)])
@pytest.mark.parametrize("classes", [1, 2, 5, 40])
def test_an_epoch_has_each_example_once_and_pairs_in_one_batch(count, size, classes):
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(count))
    batches = paired_batches(labels, size, np.random.default_rng(0))
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == batches_per_epoch(count, size) == math.ceil(count / size)
    assert max(map(len, batches)) <= size + 1 and min(map(len, batches)) >= min(count, size // 2 - 1)
    alone = sum((labels[batch] == labels[i]).sum() == 1 for batch in batches for i in batch)
    assert alone <= sum(n % 2 for n in labels.bincount().tolist()), "at most the odd one of each class"
    again = paired_batches(labels, size, np.random.default_rng(0))
    assert batches == again and (count < 3 or batches != paired_batches(labels, size, np.random.default_rng(1)))


def test_examples_with_several_labels_are_drawn_one_by_one():
    batches = paired_batches(SEVERAL, 4, np.random.default_rng(0))
    assert sorted(i for batch in batches for i in batch) == list(range(8)) and [len(b) for b in batches] == [4, 4]
