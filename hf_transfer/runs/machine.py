"""The machine: loader workers, disk space, quiet libraries."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from transformers import logging as transformers_logging

from hf_transfer.errors import WorkFailed
from hf_transfer.tasks.base import Task
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.trainer import TransferTrainer

# ---- the machine and the libraries ----


@contextlib.contextmanager
def quiet_libraries(args: TransferArguments) -> Iterator[None]:
    """No bar for every tokenised split and every file of weights: they hide the run's own lines."""
    if args.log_level in ("debug", "info"):
        yield
        return
    ours, theirs = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if not ours:
            datasets.enable_progress_bars()
        if theirs:
            transformers_logging.enable_progress_bar()


MOST_WORKERS = 8  # per training process; more have not made a loader faster than the bus
PREFETCHED = 4  # batches per worker


def end_workers(trainer: TransferTrainer) -> None:
    """End the loaders' persistent processes. Left to the garbage collector each would cost 5 s: it closes the queue
    through which torch tells them to end before torch does."""
    for loader in trainer.accelerator._dataloaders:
        inner = getattr(loader, "base_dataloader", loader)
        if inner._iterator is not None:
            inner._iterator._shutdown_workers()
            inner._iterator = None


def choose_loader(args: TransferArguments, task: Task, streaming: bool = False) -> None:
    """Workers for a run that leaves their number (-1) to us: where a device trains and pictures must be decoded.

    On the CPU loading and training would only take the cores from each other, and texts are read before training,
    unless they are streamed. Workers that were chosen live through all epochs and fetch ahead.
    """
    if streaming and args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False  # each process reads for itself: texts differ in length
    if args.dataloader_num_workers >= 0:
        return
    needs = args.device.type != "cpu" and (bool(task.suffixes) or streaming)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    args.dataloader_num_workers = max(0, min(MOST_WORKERS, _cores() // processes - 1)) if needs else 0
    if args.dataloader_num_workers:
        args.dataloader_persistent_workers = True
        args.dataloader_prefetch_factor = args.dataloader_prefetch_factor or PREFETCHED


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fit_the_machine(args: TransferArguments) -> None:
    """Pin memory only for a device; give a launched process on the CPU its share of the cores.

    `accelerate launch` gives it one thread where nobody chose a number: the same run took twice as long as under
    `hf-transfer train`.
    """
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if args.device.type == "cpu" and launched:
        torch.set_num_threads(max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_writable(output_dir: Path) -> None:
    """Raises:
    WorkFailed: nothing can be written there.
    """
    existing = _existing(output_dir)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise WorkFailed(
            f"output_dir: nothing can be written to {str(existing)!r} ({error.strerror}).", "Choose another folder."
        ) from error


def _existing(path: Path) -> Path:
    """The nearest that there is, upwards."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def check_disk(output_dir: Path, trainer: TransferTrainer) -> None:
    """Whether the disk has room for the model and one more copy, which is written before an old one goes.

    Raises:
        WorkFailed: it has not.
    """
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    needed, free = 2 * size, shutil.disk_usage(_existing(output_dir)).free
    if free < needed:
        raise WorkFailed(
            f"output_dir: the disk of {str(output_dir)!r} has {free / 1e6:,.0f} MB left, and the run writes at least "
            f"{needed / 1e6:,.0f} MB.",
            "Make room, or choose an output_dir on another disk.",
        )
