"""Keys of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import key


@dataclass
class LossArguments:
    """What examples count for."""

    class_weights: dict[str, float] | str | None = key(  # None too: transformers' parser reads `str | dict` as dict
        "none",
        "none, auto (inversely to the examples of a class; for several labels, negatives for each positive), or "
        "{name: weight}",
    )
    focal_gamma: float = key(0.0, "exponent that plays down what is already right (focal loss); 0: none")
    tune_thresholds: bool = key(
        True, "for several labels, choose each one's threshold for F1 on the validation split; false: one half"
    )
    balanced_sampling: bool = key(False, "draw training examples so that each class comes as often")
