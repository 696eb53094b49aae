"""Preflight: save the model as it will be saved after training, load it again, and compare the logits."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import nn

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.adapters.files import logits_of, reload_difference, same_logits
from hf_transfer.errors import Interrupted, UserError, chain, one_line
from hf_transfer.runs.preflight_errors import FAILURES, is_out_of_memory
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.saving import probe, reloaded, save_model
from hf_transfer.training.trainer import TransferTrainer

FOLDER = ".preflight"  # in the output folder, so that it is on the same disk
MOST_BYTES = 2 * 10**9
_MOST_OF_DISK = 0.1
_NOISE = 0.1  # of a parameter's standard deviation
_LEAST_NOISE = 0.01  # LoRA's B is zero at first
_PERIOD = 10_007  # after which it repeats: a sine for each element takes longer than saving; prime: rows must differ
Original = tuple[nn.Parameter, torch.Tensor]  # (parameter, its own values)


def why_not(trainer: TransferTrainer, output_dir: Path) -> str:
    """Why saving is not tried; empty if it is."""
    size, free = _bytes_to_write(trainer), shutil.disk_usage(output_dir).free
    if size > MOST_BYTES:
        return f"the weights take {size / 1e9:.1f} GB, more than {MOST_BYTES / 1e9:g} GB"
    if size > _MOST_OF_DISK * free:
        return f"the weights take {size / 1e6:,.0f} MB, more than a tenth of the disk's {free / 1e6:,.0f} MB free"
    return ""


def check_saving(prepared: Prepared, trainer: TransferTrainer, output_dir: Path) -> None:
    """Save the model with other values in everything that trains, load it under another seed, and compare the logits.

    Other values, because what training has not changed yet would be right even if it were not saved. The caller
    restores buffers; parameters are restored here.

    Raises:
        UserError: the logits differ, or the model cannot be saved or loaded: the run would fail at its end.
    """
    batch = probe(trainer)
    folder = output_dir / FOLDER
    with _terminable(), _temporary(folder), _other_values(trainable(trainer)) as originals:
        try:
            save_model(trainer, folder)
        except FAILURES as error:
            if any(isinstance(cause, OSError) for cause in chain(error)):  # the disk's own error is clearer
                raise
            raise _cannot(prepared, trainer, error) from error
        try:
            if is_adapted(trainer.model) and _bytes(trainer.model.parameters()) > MOST_BYTES:
                difference = _reload_adapter_alone(trainer.model, folder, originals, batch)
            else:
                again = reloaded(trainer, prepared.config, prepared.loaded.labels, str(folder))
                difference = reload_difference(trainer.model, again, batch)
        except (*FAILURES, OSError) as error:
            raise _cannot(prepared, trainer, error) from error
    if difference:
        what = f"the model gives different logits after it was saved and loaded again ({difference})"
        raise _would_fail(prepared, trainer, what)


def _cannot(prepared: Prepared, trainer: TransferTrainer, error: Exception) -> UserError:
    """The error for a model that cannot be saved or loaded."""
    if is_out_of_memory(error):
        return UserError(
            "out of memory: a second copy of the model does not fit, and the end of the run needs one to check what it "
            "saved.",
            "Use a smaller model, or a device with more memory.",
            key="model_name_or_path",
        )
    why = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error, 200)}"
    return _would_fail(prepared, trainer, f"the model cannot be saved and loaded again ({why.rstrip('.')})")


def _would_fail(prepared: Prepared, trainer: TransferTrainer, what: str) -> UserError:
    message = f"{what}, so the run would fail when it has trained."
    size = prepared.config.data.image_size
    if is_adapted(trainer.model):
        return UserError(message, "Use lora or another adapter, or other options for this one.", key="adapter")
    if size is not None:
        return UserError(message, "Remove image_size, or use a model that takes images of this size.", key="image_size")
    return UserError(message, "Use another model, or report this with its name.", key="model_name_or_path")


def trainable(trainer: TransferTrainer) -> list[nn.Parameter]:
    """The parameters that some stage trains."""
    model, unfreezing = trainer.model, trainer.unfreezing
    if unfreezing is None or trainer.plan is None:
        return [p for p in model.parameters() if p.requires_grad]
    names = {name for stage in trainer.plan.stages for name in unfreezing.trains(stage)}
    return [p for name, p in model.named_parameters() if name in names]


def _bytes_to_write(trainer: TransferTrainer) -> int:
    """Of a model with an adapter, only the adapter and the head are saved."""
    if is_adapted(trainer.model):
        return _bytes(trainable(trainer))
    return _bytes([*trainer.model.parameters(), *trainer.model.buffers()])


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _reload_adapter_alone(model: Any, folder: Path, originals: Sequence[Original], batch: dict[str, Any]) -> str:
    """How the logits differ once adapter and head, set back to their old values, are read from the files.

    For a backbone that is too large to load twice.
    """
    saved, held = logits_of(model, batch), load_peft_weights(str(folder), device="cpu")
    needed = get_peft_model_state_dict(model, save_embedding_layers=False)
    if lacking := [name for name in needed if name not in held]:
        raise UserError(f"{', '.join(lacking[:3])} would be random.")
    if model.active_peft_config.is_prompt_learning:  # loaded, it is without the network that a prompt may train behind
        other = [name for name, tensor in needed.items() if not torch.equal(held[name], tensor.cpu())]
        return f"differing parameters: {', '.join(other[:3])}" if other else ""
    _set_back(originals)
    set_peft_model_state_dict(model, held)
    again = logits_of(model, batch)
    return "" if same_logits(saved, again) else f"maximum difference {float((saved - again).abs().max()):.2g}"


# ---- contexts ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _other_values(parameters: Sequence[nn.Parameter]) -> Iterator[list[Original]]:
    """Context in which parameters have other values; yields their own."""
    originals = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, own in originals:
                scale = (own.float().std(correction=0) * _NOISE).clamp(min=_LEAST_NOISE)
                count = own.numel()
                waves = torch.arange(1, min(count, _PERIOD) + 1, device=own.device, dtype=torch.float32).sin_() * scale
                repeated = waves.repeat(-(-count // _PERIOD))[:count]
                parameter.add_(repeated.view_as(own).to(own.dtype))
        yield originals
    finally:
        _set_back(originals)


@torch.no_grad()
def _set_back(originals: Sequence[Original]) -> None:
    for parameter, own in originals:
        parameter.copy_(own)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Context in which a folder exists and is empty at first."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        folder.mkdir(parents=True)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Context in which SIGTERM raises an error, so that `finally` clauses run; SIGINT does so anyway.

    Raises:
        Interrupted: SIGTERM was received.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
