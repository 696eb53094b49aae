"""The machine: data loader workers, threads, disk space, quiet libraries."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import logging as transformers_logging

from hf_transfer import hub_client
from hf_transfer.errors import WorkFailed
from hf_transfer.runs.decisions import Decisions
from hf_transfer.tasks.base import Task
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.console import is_silent
from hf_transfer.training.trainer import TransferTrainer

MOST_WORKERS = 8  # per training process; more have not made loading faster than the bus
PREFETCHED = 4  # batches per worker


@contextlib.contextmanager
def quiet_libraries(args: TransferArguments) -> Iterator[None]:
    """Context without progress bars for each tokenized split and each file of weights, which hide the run's output.

    Downloads from a hub, which may take minutes, keep theirs. With `log_level: error` there are none, also of the pass
    over frozen features.
    """
    if args.log_level in ("debug", "info"):
        yield
        return
    verbosity = transformers_logging.get_verbosity()
    if is_silent(args):
        transformers_logging.set_verbosity_error()
    had_bars = not datasets.are_progress_bars_disabled()
    had_transformers_bars = transformers_logging.is_progress_bar_enabled()
    had_downloads = hub_client.show_downloads(not is_silent(args) and not are_progress_bars_disabled())
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()
        if had_transformers_bars:
            transformers_logging.enable_progress_bar()
        hub_client.show_downloads(had_downloads)
        transformers_logging.set_verbosity(verbosity)


def end_workers(trainer: TransferTrainer) -> None:
    """Stop the persistent workers of the data loaders.

    The garbage collector would take 5 s per worker: it closes the queue through which torch tells them to stop first.
    """
    for loader in trainer.accelerator._dataloaders:
        inner = getattr(loader, "base_dataloader", loader)
        if inner._iterator is not None:
            inner._iterator._shutdown_workers()
            inner._iterator = None


def choose_loader(args: TransferArguments, task: Task, shards: int | None = None) -> Decisions:
    """How training examples are read: the number of workers if it is left open (-1), and what depends on it.

    Workers are used if a device trains and images must be decoded or a stream is read. On the CPU, loading and training
    would compete for the cores, and texts are read before training. Workers that are chosen here are persistent and
    prefetch. Before images are trained on, `workers.choose_workers` times them.

    Args:
        args: training arguments.
        task: what the model reads.
        shards: number of shards of the training stream; None if the training set is not streamed.
    """
    is_streamed, workers = shards is not None, args.dataloader_num_workers
    decisions: Decisions = {}
    if is_streamed and args.accelerator_config.dispatch_batches is None:  # each process reads for itself: texts differ
        decisions["accelerator_config"] = replace(args.accelerator_config, dispatch_batches=False)  # in length
    if workers < 0:
        is_useful = args.device.type != "cpu" and (bool(task.suffixes) or is_streamed)
        workers = most_workers() if is_useful else 0
        if workers:
            decisions["dataloader_persistent_workers"] = True
            decisions["dataloader_prefetch_factor"] = args.dataloader_prefetch_factor or PREFETCHED
    if shards is not None:
        workers = min(workers, shards)
        if not workers:  # both require workers
            decisions |= {"dataloader_persistent_workers": False, "dataloader_prefetch_factor": None}
    return {**decisions, "dataloader_num_workers": workers}


def most_workers() -> int:
    """Workers of a training process that leave it a core."""
    return max(0, min(MOST_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pin_memory(args: TransferArguments) -> Decisions:
    """Memory is pinned only for a device."""
    return {"dataloader_pin_memory": args.dataloader_pin_memory and torch.accelerator.is_available()}


def share_cores(args: TransferArguments) -> None:
    """Give a launched process on the CPU its share of the cores, or any process the threads that `cpu_threads` says.

    `accelerate launch` gives it one thread unless the user sets a number, which doubled the time of a run compared with
    `hf-transfer train`.
    """
    if isinstance(args.cpu_threads, int):
        torch.set_num_threads(args.cpu_threads)
        return
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if args.device.type == "cpu" and is_launched:
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Context after which torch has as many threads as before: another run of the same process decides for itself."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def check_writable(output_dir: Path) -> None:
    """Raises:
    WorkFailed: the folder is not writable.
    """
    existing = _existing(output_dir)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise WorkFailed(
            f"{str(existing)!r} is not writable ({error.strerror}).", "Choose another folder.", key="output_dir"
        ) from error


def _existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


@contextlib.contextmanager
def removed_if_empty(output_dir: Path, is_new: bool) -> Iterator[None]:
    """Context in which an error removes the folder again if this run made it and nothing is in it."""
    try:
        yield
    except BaseException:
        if is_new and output_dir.is_dir() and not any(output_dir.iterdir()):
            with contextlib.suppress(OSError):  # another process was faster
                output_dir.rmdir()
        raise


def check_disk(output_dir: Path, trainer: TransferTrainer) -> None:
    """Check that the disk has room for two copies of the model: a new one is written before the old one is removed.

    Raises:
        WorkFailed: there is not enough space.
    """
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    needed, free = 2 * size, shutil.disk_usage(_existing(output_dir)).free
    if free < needed:
        raise WorkFailed(
            f"the disk of {str(output_dir)!r} has {free / 1e6:,.0f} MB free, and the run writes at least "
            f"{needed / 1e6:,.0f} MB.",
            "Free some space, or choose an output_dir on another disk.",
            key="output_dir",
        )


def device_name(kind: str) -> str:
    """The device that trains, for `results.json`; `kind` is its type."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{kind} ({torch.get_num_threads()} threads, {platform.machine()})"
