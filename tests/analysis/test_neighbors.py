"""The nearest training examples by cosine."""

from __future__ import annotations

import torch

from hf_transfer.analysis import neighbors
from hf_transfer.analysis.neighbors import nearest_of

TRAIN = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 3.0], [-1.0, 0.0], [0.0, 0.1]])


def test_by_direction_and_not_by_length(monkeypatch):
    monkeypatch.setattr(neighbors, "_AT_ONCE", 2)
    others = torch.tensor([[0.0, 9.0], [1.0, 1.0], [-7.0, 0.0]])
    found = nearest_of(TRAIN, others, 3)
    assert found.rows.tolist() == [[1, 4, 2], [2, 0, 1], [3, 1, 4]], "of equally similar ones the first"
    half = 2**-0.5
    torch.testing.assert_close(found.cosines, torch.tensor([[1, 1, half], [1, half, half], [1, 0, 0]]))


def test_fewer_training_examples_than_asked_for():
    assert nearest_of(TRAIN[:2], TRAIN, 3).rows.shape == (5, 2)
