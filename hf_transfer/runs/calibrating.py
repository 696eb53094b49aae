"""Calibrated probabilities in the saved model: what `calibrate` comes to, and dividing the last layer by T.

The logits are the output of the head's last linear layer, so that dividing its weights and bias by T divides the
logits: plain transformers, merged adapters and exported models are calibrated without any code. Checkpoints hold the
undivided layer; a run that ended before its results were written is calibrated from there, never twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_transfer.adapters.files import logits_of
from hf_transfer.config.arguments.adaptation import aligns_frozen
from hf_transfer.data.labels import REGRESSION
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.evaluation import conformal
from hf_transfer.evaluation.calibration import Calibration, fit_temperature
from hf_transfer.evaluation.metric_table import LOSS
from hf_transfer.evaluation.thresholds import LABEL_THRESHOLDS
from hf_transfer.evaluation.thresholds import logits_of as logits_among
from hf_transfer.layers.side_effects import untouched
from hf_transfer.runs.preflight_saving import trainable
from hf_transfer.runs.saving import probe, save_model
from hf_transfer.training.head import head_layers
from hf_transfer.training.trainer import TransferTrainer

FEWEST = 20  # validation examples from which `auto` calibrates, measured: see docs/calibration.md
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Choice:
    """What `calibrate` comes to.

    Attributes:
        value: whether the model is calibrated after training.
        why: why not, as part of a sentence; empty where nobody asked.
    """

    value: bool
    why: str = ""

    def line(self) -> str:
        """For display; empty where there is nothing to say."""
        return f"calibrate: off: {self.why}" if self.why else ""

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return asdict(self)


OFF = Choice(False)


def choose(trainer: TransferTrainer, problem_type: str, examples: int | None = None) -> Choice:
    """What `calibrate` comes to for a trainer that has not trained yet; called by all processes.

    Args:
        trainer: made for the run.
        problem_type: of the run.
        examples: that the saved model will be calibrated on, if not those of the validation split.

    Raises:
        UserError: `calibrate: true`, and the model cannot be calibrated.
    """
    wanted = trainer.args.calibrate
    if wanted is False:
        return OFF
    why = why_not(trainer, problem_type)
    if wanted is True and why:
        raise UserError(f"the model cannot be calibrated: {why}.", "Remove it, or use calibrate: auto.", "calibrate")
    count = len(trainer.eval_dataset) if examples is None else examples
    if not why and wanted == "auto" and count < FEWEST:
        why = f"there are {count} validation examples, fewer than {FEWEST}"
    return Choice(not why, why)


def why_not(trainer: TransferTrainer, problem_type: str) -> str:
    """Why the model cannot be calibrated, as part of a sentence; empty if it can."""
    if problem_type == REGRESSION:
        return "a regression has no probabilities"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "FSDP and DeepSpeed shard its last layer"
    if aligns_frozen(trainer.args):
        return "its head is for the features of the target, and the validation examples are of the source"
    try:
        layers = head_layers(trainer)
    except UserError as error:
        return f"its head is not known ({error.message.rstrip('.')})"
    if layers.last is None:
        return f"its head must end with one linear layer, and the trainable part of the head is {layers.shown}"
    name, weight = f"its last layer, {layers.paths[-1]},", layers.last.weight
    if weight.dtype not in _FLOATS:
        return f"{name} is quantized ({weight.dtype})"
    if sum(p is weight for _, p in trainer.model.named_parameters(remove_duplicate=False)) > 1:
        return f"{name} shares its weights with another layer"
    if not any(p is weight for p in trainable(trainer)):
        return f"{name} is frozen"
    if not _decides_logits(trainer, layers.last):
        return f"{name} is not all that its logits depend on"
    return ""


def _decides_logits(trainer: TransferTrainer, layer: nn.Linear) -> bool:
    """Whether the logits are the layer's output and nothing else; tried on a few validation examples.

    With made-up outputs, because those of a new head may be zero: four times the outputs must be four times the logits.
    """

    def logits(scale: float) -> torch.Tensor:
        def made_up(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            waves = torch.arange(1, output.numel() + 1, device=output.device, dtype=torch.float32).sin_()
            return (waves * scale).view_as(output).to(output.dtype)

        handle = layer.register_forward_hook(made_up)
        try:
            return logits_of(trainer.model, batch)
        finally:
            handle.remove()

    with untouched(trainer.model), torch.no_grad():
        batch = probe(trainer)
        once, four_times = logits(4.0), logits(16.0)
    return bool(once.any()) and torch.allclose(once * 4, four_times, rtol=1e-3)


def calibrate(trainer: TransferTrainer, validation: Any, output_dir: Path) -> Calibration:
    """Fit a temperature on the validation split, divide the last layer by it, and save the model again.

    Raises:
        WorkFailed: logits are NaN or infinite.
    """
    prediction = trainer.predict(validation)
    (answer,) = broadcast_object_list([_fit(prediction, expected_loss(trainer))])
    if isinstance(answer, WorkFailed):
        raise answer
    found: Calibration = answer
    divide(trainer, found.temperature)
    save_model(trainer, output_dir)
    return found


def divide(trainer: TransferTrainer, temperature: float) -> None:
    """Divide the last layer, and so the logits, by a temperature."""
    layer = head_layers(trainer).last
    assert layer is not None, "checked by `choose`"
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.div_(temperature)


def expected_loss(trainer: TransferTrainer) -> float | None:
    """The loss in cross-validation of the head that the run began with: that is as calibrated as its L2 strength.

    None if there is no such head, it was chosen by another measure, or its loss is weighted.
    """
    solution, loss = trainer.solution, trainer.objective.loss
    if solution is None or solution.measure != LOSS or (loss is not None and loss.weights is not None):
        return None
    return solution.score


def _fit(prediction: Any, expected_loss: float | None) -> Calibration | WorkFailed:
    """The temperature, or why there is none, for all processes."""
    try:
        return fit_temperature(logits_among(prediction.predictions), prediction.label_ids, expected_loss)
    except WorkFailed as error:
        return error


def forget(model: Any) -> None:
    """Remove from a model's configuration what an earlier run measured of it on its validation split."""
    for name in (conformal.ENTRY, LABEL_THRESHOLDS):
        vars(model.config).pop(name, None)
