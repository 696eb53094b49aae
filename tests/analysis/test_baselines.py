"""What frozen features are worth beside words and pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_transfer.analysis.baselines import PIXELS, WORDS, distance

LABELS = torch.arange(60) % 2
TEXTS = [f"film {i} {'fine' if i % 2 else 'dull'}" for i in range(60)]
NOISE = [f"film {i // 2}" for i in range(60)]


@pytest.mark.parametrize(
    ("right", "texts", "verdict"),
    [
        (torch.ones(60, dtype=torch.bool), NOISE, "near"),
        (torch.arange(60) % 3 > 0, TEXTS, "far"),
        (torch.arange(60) < 59, TEXTS, "unclear"),
    ],
)
def test_features_against_words(right, texts, verdict):
    found = distance(right, -0.2, texts, LABELS, 0)
    assert found.verdict == verdict and found.input_is == WORDS and found.chance == 0.5
    assert found.gain == pytest.approx(found.features - found.input)
    assert found.line().startswith(f"Domain: frozen features {found.features:.2f}, words alone")
    if texts is TEXTS:
        assert found.input == 1.0, "the word says the class"


def test_features_against_pixels():
    pixels = np.random.default_rng(0).normal(size=(60, 16))
    pixels[:, 3] += 4 * LABELS.numpy()
    found = distance(torch.arange(60) % 2 > 0, 0.0, pixels, LABELS, 0)
    assert found.input > 0.9 and found.input_is == PIXELS and found.verdict == "far"
    assert found == distance(torch.arange(60) % 2 > 0, 0.0, pixels, LABELS, 0)
