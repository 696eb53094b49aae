"""Keys of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting


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
