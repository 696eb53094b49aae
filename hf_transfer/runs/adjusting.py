"""`logit_adjustment`: offsets of the logits, added to the bias of the saved model's last layer.

As with the temperature (`runs.calibrating`), plain transformers, merged adapters and exported models then answer alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from hf_transfer.data.labels import SINGLE_LABEL
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.evaluation.logit_adjustment import LogitAdjustment, choose_offsets
from hf_transfer.evaluation.thresholds import logits_of
from hf_transfer.runs.calibrating import why_not
from hf_transfer.runs.saving import save_model
from hf_transfer.training.head import head_layers
from hf_transfer.training.trainer import TransferTrainer

KEY = "logit_adjustment"


def check(trainer: TransferTrainer, problem_type: str) -> None:
    """Check that the model's logits can have offsets, if they are asked for; called by all processes.

    Raises:
        UserError: they cannot.
    """
    wanted = trainer.args.logit_adjustment
    if wanted == "none":
        return
    if problem_type != SINGLE_LABEL:
        raise UserError(
            f"{wanted} needs one label per example, and this is a {problem_type.replace('_', ' ')}.",
            "Remove it; of several labels, tune_thresholds: true chooses the thresholds.",
            KEY,
        )
    reason = why_not(trainer, problem_type)
    layer = None if reason else head_layers(trainer).last
    if layer is not None and layer.bias is None:
        reason = "its last layer has no bias, which would hold them"
    if reason:
        raise UserError(f"the model's logits cannot have offsets: {reason}.", "Remove it.", KEY)


def adjust(trainer: TransferTrainer, validation: Any, output_dir: Path) -> LogitAdjustment | None:
    """Choose offsets on the validation split, add them to the last layer's bias, and save the model again.

    Returns:
        What was chosen; None if nobody asked.

    Raises:
        WorkFailed: logits are NaN or infinite.
    """
    if trainer.args.logit_adjustment == "none":
        return None
    prediction = trainer.predict(validation)
    (answer,) = broadcast_object_list([_chosen(prediction, trainer.args.logit_adjustment)])
    if isinstance(answer, WorkFailed):
        raise answer
    if answer.strength:
        put(trainer, answer)
        save_model(trainer, output_dir)
    return answer


def put(trainer: TransferTrainer, adjustment: LogitAdjustment, times: int = 1) -> None:
    """Add the offsets to the last layer's bias, or with -1 take them away."""
    layer = head_layers(trainer).last
    assert layer is not None, "checked before training"
    if adjustment.strength:
        with torch.no_grad():
            layer.bias.add_(torch.tensor(adjustment.offsets).to(layer.bias), alpha=times)


def _chosen(prediction: Any, metric: str) -> LogitAdjustment | WorkFailed:
    """The offsets, or why there are none, for all processes."""
    try:
        return choose_offsets(logits_of(prediction.predictions), prediction.label_ids, metric)
    except WorkFailed as error:
        return error
