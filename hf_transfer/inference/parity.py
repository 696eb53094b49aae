"""Whether two forms of a model answer alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_transfer.data.labels import REGRESSION, SINGLE_LABEL
from hf_transfer.errors import WorkFailed
from hf_transfer.inference.predictor import Predictor

TOLERANCE = 1e-4  # of logits in fp32, relative to the largest where that exceeds 1
_SINGLY = 8  # inputs that are compared one by one


def compared(reference: Predictor, other: Predictor, values: Sequence[tuple[Any, ...]], on: str) -> dict[str, Any]:
    """How the answers of two forms differ: in batches, and singly in reverse order.

    Args:
        reference: the form that is right.
        other: the form to judge.
        values: inputs, as `Predictor.logits` takes them.
        on: what they are, for display.

    Returns:
        `on`, `examples`, `max_difference` of the logits, `allowed` in fp32, and `other_labels`: how many labels differ.
    """
    own = _logits(reference, values, reference.batch_size)
    few = slice(min(_SINGLY, len(values)) - 1, None, -1)
    pairs = [
        (own, _logits(other, values, reference.batch_size)),
        (own[few], _logits(other, values[few], 1)),
    ]
    differences = [float(np.abs(one - two).max()) for one, two in pairs]
    return {
        "on": on,
        "examples": len(own),
        "max_difference": float(np.max(differences)),
        "allowed": TOLERANCE * max(1.0, float(np.abs(own).max())),
        "other_labels": sum(a != b for a, b in zip(*(_labels(reference, z) for z in pairs[0]), strict=True)),
    }


def check_equal(found: dict[str, Any]) -> None:
    """Raises:
    WorkFailed: what `compared` found is more than rounding.
    """
    if not found["max_difference"] <= found["allowed"] or found["other_labels"]:
        raise WorkFailed(
            f"The exported model answers otherwise than PyTorch: logits differ by up to {found['max_difference']:.2g} "
            f"({found['allowed']:.1g} is allowed), and {found['other_labels']} of {found['examples']} labels, on "
            f"{found['on']}. Nothing was kept.",
            "Another format may do, or the run's own folder. Please report it with the name of the model.",
        )


def _logits(predictor: Predictor, values: Sequence[tuple[Any, ...]], size: int) -> Any:
    """(examples, outputs), computed in batches of `size`."""
    return np.concatenate([predictor.logits(values[i : i + size])[0] for i in range(0, len(values), size)])


def _labels(predictor: Predictor, logits: Any) -> list[Any]:
    """What an answer calls each row of logits; nothing of a regression."""
    if predictor.labels.problem_type == REGRESSION:
        return []
    name = "label" if predictor.labels.problem_type == SINGLE_LABEL else "labels"
    return [predictor.answer(row)[name] for row in logits]
