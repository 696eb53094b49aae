"""The files for people that a run ends with: its report, and pictures of what it read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_transfer.data.preview import draw_batch
from hf_transfer.data.stream_training import Stream
from hf_transfer.errors import one_line
from hf_transfer.evaluation.calibration import Calibration
from hf_transfer.evaluation.diagnostics import Change
from hf_transfer.evaluation.logit_adjustment import LogitAdjustment
from hf_transfer.inference.predictor import Predictor
from hf_transfer.report import page
from hf_transfer.run_folder import EXPLANATIONS, REPORT, TRAIN_BATCH_PNG
from hf_transfer.runs.explaining import write_explanations
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer


def change_of(calibration: Calibration | None, adjustment: LogitAdjustment | None) -> Change | None:
    """What a run did to the logits after training; None for nothing."""
    offsets = adjustment.offsets if adjustment is not None and adjustment.strength else ()
    if calibration is None and not offsets:
        return None
    return Change(calibration.temperature if calibration is not None else 1.0, offsets)


def write_report(prepared: Prepared, trainer: TransferTrainer, predictor: Predictor, train: Any, folder: Path) -> None:
    """Write the report of a finished run and the pictures next to it; called by all processes.

    A failure is a warning: the run is whole all the same.

    Args:
        prepared: the run's data.
        trainer: with the trained model.
        predictor: this model at work.
        train: the prepared training split.
        folder: of the run.
    """
    if not trainer.is_world_process_zero():
        return
    is_whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)  # else all processes would have to compute
    explained = {EXPLANATIONS: partial(write_explanations, prepared, predictor, folder)} if is_whole else {}
    parts: dict[str, Callable[[], object]] = {
        **explained,
        TRAIN_BATCH_PNG: partial(_draw_batch, prepared, trainer, train, folder),
        REPORT: partial(page.write, folder),
    }
    for name, write in parts.items():
        try:
            write()
        except Exception as error:  # whatever a library says of a picture or a disk: the model is trained and saved
            warnings.warn(f"{name} was not written ({type(error).__name__}: {one_line(error)}).", stacklevel=2)


def _draw_batch(prepared: Prepared, trainer: TransferTrainer, train: Any, folder: Path) -> None:
    """Draw what the model saw; nothing of a stream, which was read already."""
    if isinstance(train, Stream):
        return
    beside, labels = folder / f".{TRAIN_BATCH_PNG}", prepared.loaded.labels
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a label or token, drawn as a box
        is_drawn = draw_batch(beside, train, trainer.data_collator, prepared.processor, labels, prepared.chance)
    if is_drawn:
        beside.replace(folder / TRAIN_BATCH_PNG)
