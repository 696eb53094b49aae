"""Keys of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_transfer.config.fields import setting
from hf_transfer.errors import nearest


@dataclass
class LossArguments:
    """What examples count for."""

    class_weights: dict[str, float] | str | None = setting(  # None too: transformers' parser reads `str | dict` as dict
        "none",
        "weights of the classes in the loss: none, auto (inversely proportional to class frequency; for several "
        "labels, the ratio of negatives to positives), or {name: weight}",
        resume="plan",
        card="changed",
    )
    focal_gamma: float = setting(
        0.0,
        "focal loss: exponent that down-weights examples that are already classified well; 0: none",
        minimum=0,
        resume="plan",
        card="changed",
    )
    tune_thresholds: bool = setting(
        True,
        "for several labels, choose each label's threshold for F1 on the validation split; false: 0.5",
        resume="free",
        card="changed",
    )
    balanced_sampling: bool = setting(
        False, "sample training examples so that all classes are equally frequent", resume="fixed", card="changed"
    )


def check(args: LossArguments) -> list[str]:
    """Problems of the keys, one sentence each."""
    problems = []
    weights = args.class_weights
    if isinstance(weights, str) and weights not in ("none", "auto"):
        problems.append(
            f"class_weights: {weights!r} must be none, auto or a mapping.{nearest(weights, ('none', 'auto'))}"
        )
    if isinstance(weights, Mapping):
        problems += [
            f"class_weights: {name}: {w!r} must be a number of 0 or more."
            for name, w in weights.items()
            if isinstance(w, bool) or not isinstance(w, int | float) or not 0 <= w < float("inf")
        ]
    return problems
