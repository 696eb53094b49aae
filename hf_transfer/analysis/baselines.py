"""How far the data is from what the model was pretrained on, by what its frozen features are worth.

Domain distance has no scale of its own. What counts for transfer is whether the features separate the labels better
than the input itself does: words counted (TF-IDF) or raw pixels, with a linear model, on the same examples in the same
folds. Features that are no better than the input come from far away, and then more of the model has to train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hf_transfer.features.convex_head import SINGLE
from hf_transfer.features.cross_validation import Array, divisions

_CLEAR = 2.0  # standard errors of a paired difference
NEAR, FAR, UNCLEAR = "near", "far", "unclear"
WORDS, PIXELS = "words alone (TF-IDF)", "raw pixels"


@dataclass(frozen=True)
class Distance:
    """What frozen features are worth beside the input itself; accuracies in cross-validation.

    Attributes:
        features: of the best head on frozen features.
        input: of a linear model on the input itself.
        input_is: what that is.
        chance: of always naming the most frequent class.
        gain: `features` less `input`.
        error: standard error of `gain`, paired by example.
        logme: of the features.
    """

    features: float
    input: float
    input_is: str
    chance: float
    gain: float
    error: float
    logme: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """`near`, `far`, or `unclear`."""
        if self.gain > _CLEAR * self.error:
            return NEAR
        return FAR if self.gain < -_CLEAR * self.error else UNCLEAR

    def line(self) -> str:
        """For display."""
        says = {
            NEAR: "the pretrained features suit this data",
            FAR: "the pretrained features know less of this data than the input itself says: train all layers, and "
            "compare another model (--models)",
            UNCLEAR: "whether the pretrained features suit this data is not clear from so few examples",
        }
        return (
            f"Domain: frozen features {self.features:.2f}, {self.input_is} {self.input:.2f}, chance {self.chance:.2f} "
            f"(accuracy of linear heads in the same cross-validation): {says[self.verdict]}. LogME {self.logme:.3f}."
        )


def distance(
    right: torch.Tensor, logme: float, inputs: Sequence[str] | Array, labels: torch.Tensor, seed: int
) -> Distance:
    """What frozen features are worth beside the input itself.

    Args:
        right: (examples,) whether the head on frozen features is right, each in cross-validation.
        logme: of the features.
        inputs: texts, or (examples, pixels).
        labels: (examples,) classes.
        seed: of the folds, as of the head's.
    """
    is_text = not isinstance(inputs, np.ndarray)
    truth, own = labels.numpy(), np.zeros(len(labels), dtype=bool)
    (folds,) = divisions(SINGLE, labels, 1, seed)
    for fold in np.unique(folds):
        rows, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        model = _model(is_text)
        model.fit(_of(inputs, rows), truth[rows])
        own[held] = model.predict(_of(inputs, held)) == truth[held]
    difference = right.numpy().astype(float) - own
    return Distance(
        features=float(right.double().mean()),
        input=float(own.mean()),
        input_is=WORDS if is_text else PIXELS,
        chance=float(np.bincount(truth).max() / len(truth)),
        gain=float(difference.mean()),
        error=float(difference.std(ddof=1) / math.sqrt(len(difference))),
        logme=logme,
    )


def _model(is_text: bool) -> Any:
    """A pipeline of scikit-learn, which is slow to import, and only `plan` asks for the distance."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if is_text:
        vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\S+")
        return make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=500))
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))


def _of(inputs: Sequence[str] | Array, rows: Array) -> Any:
    return inputs[rows] if isinstance(inputs, np.ndarray) else [inputs[int(row)] for row in rows]
