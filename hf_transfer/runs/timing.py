"""Real steps of a run, timed before it trains; the model, the trainer and all random numbers stay as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher

from hf_transfer.analysis.pace import COMPILE_ANYWAY, Pace, StagePace, compile_note, in_time
from hf_transfer.analysis.range_test import Sweep
from hf_transfer.errors import UserError
from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import is_numbered
from hf_transfer.runs.dry_run import spread
from hf_transfer.runs.preflight import without_trace
from hf_transfer.runs.preflight_examples import Examples, examples_of
from hf_transfer.runs.preflight_stages import Step, batch_sizes_and_steps
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.process_memory import Taken, resident, taken_by
from hf_transfer.runs.room import room
from hf_transfer.settings import Config
from hf_transfer.training.cache_stage import CachedStage
from hf_transfer.training.trainer import TransferTrainer
from hf_transfer.training.trial import seconds_of_step

BATCHES = 6  # timed of each stage
LIMIT = 4.0  # seconds, after which no further batch of a stage is timed
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def measure(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> Pace | None:
    """The pace of each stage; None where it cannot be known: nothing takes steps, plateaus end stages, the model is
    sharded, or the batches of a stream are not known yet.

    Args:
        prepared: data and model.
        trainer: with its plan resolved and its boundary cache decided.
        splits: prepared examples by split.
    """
    plan = trainer.plan
    if plan is None or trainer._solves or plan.waits or not is_numbered(trainer.train_dataset):
        return None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    try:
        with without_trace(trainer):
            return _measure(prepared, trainer, splits)
    except FAILURES:
        return None


def _measure(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> Pace | None:
    plan, args = trainer.plan, trainer.args
    assert plan is not None
    train = examples_of(prepared, trainer, splits)["train"]
    batches = batches_of(trainer)
    if batches is None:
        return None
    _, steps = batch_sizes_and_steps(trainer)
    ends = [*(stage.start for stage in plan.stages[1:]), trainer.num_steps]
    occupied = _resident(trainer) if args.device.type == "cpu" else None
    free = None if occupied is None else room(args).free
    tried = _tried(trainer, train, steps, batches)
    stages = []
    for i, (stage, end) in enumerate(zip(plan.stages, ends, strict=True)):
        one = tried[i]
        seconds = one.seconds * args.gradient_accumulation_steps / _gain(trainer.boundary.entries, i) + one.optimizer
        most, kept = (one.memory.most, one.memory.kept) if one.memory else (None, None)
        stages.append(StagePace(stage.name, (end or 0) - (stage.start or 0), seconds, one.count, most, kept))
    return Pace(args.device.type, torch.get_num_threads(), tuple(stages), occupied, free)


@dataclass(frozen=True)
class _Tried:
    """What the steps of a stage showed.

    Attributes:
        seconds: of a batch.
        optimizer: seconds of a step of the optimizer.
        count: batches that were timed.
        memory: what a step on the largest batch took of the process's memory; None where that is not known.
    """

    seconds: float
    optimizer: float
    count: int
    memory: Taken | None


def _tried(
    trainer: TransferTrainer, train: Examples, steps: Sequence[Step], batches: Sequence[Sequence[int]]
) -> list[_Tried]:
    """By stage; after `LIMIT`, a stage counts as one that trains more."""
    tried: dict[frozenset[str], _Tried] = {}
    found: dict[int, _Tried] = {}
    largest = max(batches, key=lambda numbers: _size(train, numbers))
    began = time.perf_counter()
    for i in spread(sorted(range(len(steps)), key=lambda i: -len(steps[i].parameters))):
        names = steps[i].parameters
        wider = [others for others in tried if others >= names]
        if names not in tried and wider and time.perf_counter() - began > LIMIT:
            found[i] = replace(tried[min(wider, key=len)], count=0)
            continue
        if names not in tried:
            memory = _memory(trainer, train.batch(largest), steps[i])
            seconds, count = _seconds(trainer, train, steps[i], batches)
            tried[names] = _Tried(seconds, _of_optimizer(trainer, steps[i]), count, memory)
        found[i] = tried[names]
    return [found[i] for i in range(len(steps))]


def _resident(trainer: TransferTrainer) -> int | None:
    """Bytes of the process in memory, with all of the model: of a file that is memory-mapped, it holds what was read.

    Tables of embeddings are read row by row, until the optimizer or the checkpoint reads all of them.
    """
    for parameter in trainer.model.parameters():
        parameter.detach().sum()
    return resident()


def _memory(trainer: TransferTrainer, batch: Batch, step: Step) -> Taken | None:
    """What a step takes of the process's memory; None on a GPU, whose memory is its own."""
    if trainer.args.device.type != "cpu":
        return None
    with step.training():
        return taken_by(lambda: seconds_of_step(trainer, batch))


def batches_of(trainer: TransferTrainer) -> list[list[int]] | None:
    """Numbers of the examples in each batch of an epoch; None where another process divides them."""
    loader = trainer.get_train_dataloader()
    if isinstance(loader, DataLoaderDispatcher):
        return None
    return [list(numbers) for numbers in loader.batch_sampler]


def _gain(caches: Sequence[CachedStage], index: int) -> float:
    """By how much the boundary cache is expected to make a stage quicker."""
    if index >= len(caches) or caches[index].off is not None:
        return 1.0
    return max(1.0, caches[index].gain or 1.0)


def _seconds(
    trainer: TransferTrainer, train: Examples, step: Step, batches: Sequence[Sequence[int]]
) -> tuple[float, int]:
    """(seconds of a mean batch, loading included; how many were timed).

    Batches of texts differ in length: their time per token counts, and the tokens of all batches.
    """
    chosen = batches[:: max(1, len(batches) // BATCHES)][:BATCHES]
    seconds, sizes = 0.0, []
    with step.training():
        seconds_of_step(trainer, train.batch(chosen[len(chosen) // 2]))
        began = time.perf_counter()
        for numbers in chosen:
            loaded = time.perf_counter()
            batch = train.batch(numbers)
            seconds += time.perf_counter() - loaded + seconds_of_step(trainer, batch)
            sizes.append(_size(train, numbers))
            if time.perf_counter() - began > LIMIT:
                break
    mean = sum(_size(train, numbers) for numbers in batches) / len(batches)
    return seconds / sum(sizes) * mean, len(sizes)


def _size(train: Examples, numbers: Sequence[int]) -> float:
    """Tokens of a batch, padding included; of images their number."""
    if train.lengths is None:
        return len(numbers)
    return len(numbers) * float(max(train.lengths[number] for number in numbers))


def _of_optimizer(trainer: TransferTrainer, step: Step) -> float:
    """Seconds of clipping and an optimizer step, on copies of what trains; 0 where there is no room for them."""
    args = trainer.args
    own = [p for name, p in trainer.model.named_parameters() if name in step.parameters]
    free = room(args).free
    if not own or (free is not None and 5 * sum(p.numel() * p.element_size() for p in own) > free):
        return 0.0
    cls, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in own]
    for copied in copies:
        copied.grad = torch.zeros_like(copied)
    optimizer, seconds = cls(copies, **options), 0.0
    for _ in range(2):  # the first makes the states
        began = time.perf_counter()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(copies, args.max_grad_norm)
        optimizer.step()
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        seconds = time.perf_counter() - began
    return seconds


def compilation(config: Config, pace: Pace | None) -> str:
    """Why `torch_compile` cannot pay back; empty if it may, or if a backend was named: that is asked for on purpose."""
    if pace is None or not config.training.torch_compile or "torch_compile_backend" in config.given:
        return ""
    return compile_note(pace)


def check_compilation(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> None:
    """Check that compiling can pay back, in a run of one process, by timed steps.

    Raises:
        UserError: it cannot.
    """
    config = prepared.config
    if trainer.args.world_size > 1 or not config.training.torch_compile or "torch_compile_backend" in config.given:
        return
    if line := compilation(config, measure(prepared, trainer, splits)):
        raise UserError(line, COMPILE_ANYWAY, key="torch_compile")


def search_note(config: Config, pace: Pace | None) -> str:
    """What `learning_rate: auto` will take before training; empty if the learning rate is known."""
    if not config.finds_rate:
        return ""
    steps = Sweep().steps
    said = f"learning_rate: auto: a range test of at most {steps} steps comes before training"
    if pace is None:
        return f"{said}; the rates of this plan are the defaults, which it replaces."
    longest = max(stage.seconds_per_step for stage in pace.stages)
    return f"{said}, about {in_time(steps * longest)}; the rates of this plan are the defaults, which it replaces."


# ---- threads -------------------------------------------------------------------------------------------------------


def seconds_by_threads(
    prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], candidates: Sequence[int], rounds: int
) -> dict[int, float]:
    """Seconds of a training step of the stage that trains most, with each number of threads: the least of its rounds.

    A round tries all candidates, so that a load that comes and goes is in all of them.
    """
    before, least = torch.get_num_threads(), dict.fromkeys(candidates, float("inf"))
    try:
        with without_trace(trainer):
            batch, step = _usual(prepared, trainer, splits)
            with step.training():
                for number in range(rounds + 1):
                    for threads in candidates:
                        torch.set_num_threads(threads)
                        seconds = seconds_of_step(trainer, batch)
                        if number:  # the first warms up
                            least[threads] = min(least[threads], seconds)
    finally:
        torch.set_num_threads(before)
    return least


def _usual(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> tuple[Batch, Step]:
    """(a batch of median size, the stage that trains most)."""
    train = examples_of(prepared, trainer, splits)["train"]
    batches = batches_of(trainer) or [train.first(trainer._train_batch_size)]
    _, steps = batch_sizes_and_steps(trainer)
    ordered = sorted(batches, key=lambda numbers: _size(train, numbers))
    return train.batch(ordered[len(ordered) // 2]), max(steps, key=lambda step: len(step.parameters))
