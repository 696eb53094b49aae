"""`dataloader_num_workers: auto`: how many processes load images, by timed batches.

Workers are worth their start only if loading takes a good part of a batch's time and there are cores for them: on the
CPU, training takes the same ones. So loading is timed against a training step first, and where it is not small beside
it, workers are tried. Their number changes no result, so a run that is repeated or resumed may choose another one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from hf_transfer.analysis.few_labels import Choice
from hf_transfer.features.examples import is_numbered
from hf_transfer.runs.machine import PREFETCHED, most_workers
from hf_transfer.runs.preflight import without_trace
from hf_transfer.runs.preflight_examples import Examples, examples_of
from hf_transfer.runs.preflight_stages import Step, batch_sizes_and_steps
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.timing import FAILURES
from hf_transfer.training.trainer import TransferTrainer
from hf_transfer.training.trial import seconds_of_step

KEY = "dataloader_num_workers"
SMALL = 0.05  # of a batch's time: loading that is not worth a worker
WORTH = 0.95  # of the time of a batch without workers, above which there are none
ON_CPU = 8  # images of a batch that is timed on the CPU, where more take seconds
START = 1.0  # seconds that workers take to start, about
ROUNDS = 2  # batches of each worker that are timed, after one that is not


def choose_workers(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> Prepared:
    """The run with the number of workers that the probe comes to, if it is left open and images are loaded.

    Texts are tokenized before training and streams have decided (`machine.choose_loader`); a head that is solved for
    and a sharded model take no step before training.
    """
    if prepared.config.values[KEY] >= 0 or not prepared.task.suffixes or not is_numbered(trainer.train_dataset):
        return prepared
    if trainer._solves or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return prepared
    answer = [_probed(prepared, trainer, splits)]
    if trainer.args.world_size > 1:
        broadcast_object_list(answer)
    return _set(prepared, trainer, answer[0])


def _probed(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> Choice:
    most = most_workers()
    if not most:
        return Choice(0, "there is one core for each process")
    try:
        with without_trace(trainer):
            return _timed(trainer, examples_of(prepared, trainer, splits)["train"], most)
    except FAILURES:
        return Choice(trainer.args.dataloader_num_workers, "no batch could be timed")


def _timed(trainer: TransferTrainer, train: Examples, most: int) -> Choice:
    on_cpu, size = trainer.args.device.type == "cpu", trainer._train_batch_size
    count = min(len(train), size, ON_CPU if on_cpu else size)
    _, steps = batch_sizes_and_steps(trainer)
    step = _longest(trainer, steps)
    train.batch([0])  # the first imports what decodes
    numbers = _spread(len(train), count, 0)
    batch = train.batch(numbers)
    loading = _seconds(lambda: train.batch(numbers))
    with step.training():
        stepping = seconds_of_step(trainer, batch)
        if loading > SMALL / 2 * stepping:  # else it is small, although the first step is slower than others
            stepping = seconds_of_step(trainer, batch)
        share = loading / (loading + stepping)
        said = f"loading takes {share:.0%} of a batch's time"
        if share < SMALL:
            return Choice(0, said)
        workers = min(most, math.ceil(loading / stepping) + 1)
        batches = trainer.num_steps * trainer.args.gradient_accumulation_steps * size / count
        if batches * loading < START + (1 + ROUNDS) * workers * (loading + stepping):
            return Choice(0, f"{said}, and the run is too short for workers to pay back")
        tried = _seconds_with(workers, trainer, train, count, lambda: seconds_of_step(trainer, batch))
    ratio = tried / (loading + stepping)
    many = "1 worker" if workers == 1 else f"{workers} workers"
    said = f"{said}; with {many} a batch takes {ratio:.2f} times as long"
    return Choice(workers if ratio < WORTH else 0, said)


def _longest(trainer: TransferTrainer, steps: list[Step]) -> Step:
    """The stage with the most steps."""
    plan = trainer.plan
    if plan is None or plan.waits:
        return steps[-1]
    starts = [stage.start or 0 for stage in plan.stages]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], trainer.num_steps], strict=True)]
    return steps[lengths.index(max(lengths))]


def _spread(total: int, count: int, number: int) -> list[int]:
    """The examples of the given batch: over the whole dataset, as files of one folder may be of one size."""
    return [(number + i * max(1, total // count)) % total for i in range(count)]


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _seconds_with(
    workers: int, trainer: TransferTrainer, train: Examples, count: int, step: Callable[[], Any]
) -> float:
    """Seconds of a batch while workers load the next ones; none is ahead by more than one of each worker."""
    batches = [_spread(len(train), count, number) for number in range((1 + ROUNDS) * workers)]
    loader = DataLoader(
        train.source.dataset,
        batch_sampler=batches,
        collate_fn=train.source.collate,
        num_workers=workers,
        prefetch_factor=1,
        multiprocessing_context=trainer.args.dataloader_multiprocessing_context,
    )
    began = 0.0
    for number, _ in enumerate(loader):
        if number == workers:
            began = time.perf_counter()
        step()
    return (time.perf_counter() - began) / (ROUNDS * workers)


def _set(prepared: Prepared, trainer: TransferTrainer, choice: Choice) -> Prepared:
    """Not in `trainer.chosen`: a resumed run, perhaps on another machine, chooses again."""
    args = trainer.args
    args.dataloader_num_workers, args.dataloader_persistent_workers = choice.value, choice.value > 0
    asked = prepared.config.values["dataloader_prefetch_factor"]
    args.dataloader_prefetch_factor = (asked or PREFETCHED) if choice.value else None  # torch refuses it without them
    chosen = replace(prepared.chosen, keys={**prepared.chosen.keys, KEY: choice})
    return replace(prepared, chosen=chosen)
