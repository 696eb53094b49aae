"""Saving a run's model and checking that it reloads."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.adapters.files import check_reload, write_config
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.labels import Labels
from hf_transfer.data.record import Record
from hf_transfer.data.stream_training import Stream
from hf_transfer.errors import UserError, WorkFailed, named
from hf_transfer.files import say
from hf_transfer.inference.predictor import saved_model
from hf_transfer.run_folder import (
    CARD,
    EXAMPLES,
    OF_ONE_RUN,
    REPLACED,
    RESULTS,
    RUN_FILE,
    model_files,
    remove_model,
    weights_in,
)
from hf_transfer.runs.prepare import Prepared
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task
from hf_transfer.training import checkpoints
from hf_transfer.training.trainer import TransferTrainer


def record_examples(prepared: Prepared, output_dir: Path, is_resumed: bool, refits: bool = False) -> None:
    """Write what the examples are, before any of them is trained on; `refits`: those of the validation split too."""
    path, record = output_dir / EXAMPLES, Record.of(prepared.data, prepared.config.data, refits)
    earlier = Record.load(path) if is_resumed else None
    (record if earlier is None else record.including(earlier)).save(path)


@contextlib.contextmanager
def recorded_stream(train: Any, output_dir: Path, skips_ahead: bool) -> Iterator[None]:
    """Context of training; what a stream gave to it is added to the record of the examples.

    Args:
        train: the training set.
        output_dir: where the record is.
        skips_ahead: whether a resumed run reads only what comes after its checkpoint, so that what it trained on before
            is not known. Otherwise it reads a stream again from its start.
    """
    passed = train.read.passed if isinstance(train, Stream) else None
    if passed is None or skips_ahead:
        yield
        return
    passed.begin()
    try:
        yield
        record = Record.load(output_dir / EXAMPLES)
        assert record is not None, "written before training"
        parts = [part for part in (record.streamed, passed.contents()) if part is not None and len(part)]
        streamed = np.unique(np.concatenate(parts)) if parts else None  # resumed at its last step, it reads nothing
        replace(record, streamed=streamed).save(output_dir / EXAMPLES)
    finally:
        passed.end()


def check_saved(trainer: TransferTrainer, task: Task, config: Config, labels: Labels) -> None:
    """Load what was saved, under another seed, and compare its answers with the trained model's.

    Raises:
        WorkFailed: they differ.
    """
    if not task.auto_class or not trainer.is_world_process_zero():
        return
    folder = str(config.training.output_dir)
    try:
        again = reloaded(trainer, config, labels, folder)
    except UserError as error:
        raise WorkFailed(f"The model that was just saved cannot be loaded: {error}") from error
    check_reload(trainer.model, again, probe(trainer), folder)


def reloaded(trainer: TransferTrainer, config: Config, labels: Labels, folder: str) -> Any:
    """The model that was saved in a folder, as `predict` loads it, which knows nothing of the run's keys.

    Under another seed: what was not saved is then different.

    Raises:
        UserError: it cannot be loaded, lacks parameters, or answers with other labels.
    """
    # What a user must say again of code and pickles is not in the files.
    saved = ModelArguments(
        folder, trust_remote_code=config.model.trust_remote_code, allow_pickle=config.model.allow_pickle
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.args.seed + 1)
        _, loaded, _ = saved_model(saved, config.data)
    if loaded.fresh:
        raise UserError(f"{', '.join(loaded.fresh[:3])} would be random.")
    if loaded.labels != labels:
        raise UserError(f"it would answer with {named(loaded.labels.names)} instead of {named(labels.names)}.")
    return loaded.model


def probe(trainer: TransferTrainer) -> dict[str, Any]:
    """A small batch of what was held out, without labels."""
    examples: Any = trainer.eval_dataset
    batch = trainer.data_collator([examples[i] for i in range(min(4, len(examples)))])
    return {k: v for k, v in batch.items() if k != "labels"}


def save_config(trainer: TransferTrainer, folder: Path) -> None:
    """Write the model's configuration again, beside and renamed."""
    if not trainer.is_world_process_zero():
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        if is_adapted(trainer.model):
            write_config(trainer.model, beside)
        else:
            trainer.model.config.save_pretrained(beside)
        for path in Path(beside).iterdir():
            path.replace(folder / path.name)


def save_model(trainer: TransferTrainer, folder: Path) -> None:
    """Save beside and move: `folder` holds the whole model or, on a full disk, what it held before."""
    beside = folder / ".saving"
    try:
        trainer.save_model(str(beside))
        if trainer.is_world_process_zero():
            (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.yaml says the same in the open
            remove_model(folder, but={path.name for path in beside.iterdir()})
            for path in beside.iterdir():
                path.replace(folder / path.name)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(beside, ignore_errors=True)


def clear(output_dir: Path, talks: bool) -> None:
    """Remove what an earlier run left and this one would mix up with its own.

    The earlier model and the files about it stay in `REPLACED` until `forget_replaced`. A run that did not finish does
    not displace a finished one that is kept there already.

    Args:
        output_dir: of the new run.
        talks: whether to say that something is kept.
    """
    kept = output_dir / REPLACED
    if (output_dir / RESULTS).is_file() or (weights_in(output_dir) and not kept.is_dir()):
        _keep(output_dir, kept)
    (output_dir / RESULTS).unlink(missing_ok=True)  # first: what is left of a finished run is not taken for one
    remove_model(output_dir)
    for name in OF_ONE_RUN:
        (output_dir / name).unlink(missing_ok=True)
    for folder in (*checkpoints.checkpoints(output_dir), *output_dir.glob(f"{checkpoints.BROKEN}checkpoint-*")):
        shutil.rmtree(folder)
    if talks and kept.is_dir():
        say(f"The earlier run stays in {str(kept)!r} until this one is complete.")


def forget_replaced(output_dir: Path) -> None:
    """Remove what `clear` kept: the new run is complete."""
    shutil.rmtree(output_dir / REPLACED, ignore_errors=True)


def _keep(output_dir: Path, kept: Path) -> None:
    """Put a run's model and the files about it into a folder of their own, whole at every instant."""
    beside = output_dir / f".{REPLACED}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    about = [output_dir / name for name in (RUN_FILE, CARD, *OF_ONE_RUN)]
    for path in {*model_files(output_dir), *filter(Path.is_file, about)}:
        try:
            os.link(path, beside / path.name)
        except OSError:  # a file system without hard links; a full disk fails again, and the earlier run is untouched
            shutil.copy2(path, beside / path.name)
    shutil.rmtree(kept, ignore_errors=True)
    beside.replace(kept)
