"""Keys of the probabilities of a trained model."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting


@dataclass
class CalibrationArguments:
    """What becomes of the logits after training."""

    calibrate: bool | str = setting(
        False,
        "after training, divide the last linear layer by a temperature fitted on the validation split, so that "
        "probabilities match frequencies; auto: for classifiers with enough validation examples",
        choices=("auto", "true", "false"),
        resume="free",
        card="changed",
    )
    logit_adjustment: str = setting(
        "none",
        "after training and calibration, add an offset to each class's logit so that rare classes count as much as "
        "frequent ones; its strength is chosen on the validation split by this metric (recall_macro is balanced "
        "accuracy)",
        choices=("none", "f1_macro", "recall_macro"),
        resume="free",
        card="changed",
    )
