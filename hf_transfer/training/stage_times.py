"""How long an optimizer step of each stage takes, from a batch before training."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Any

from hf_transfer.features.examples import TRAINING, VALIDATION, is_numbered
from hf_transfer.layers.side_effects import untouched
from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.training import trial
from hf_transfer.training.cache_stage import Off, OffReason
from hf_transfer.training.running import RunningTrainer

_DISK = 2e8  # bytes of a checkpoint per second (written, flushed, hashed), until the first was saved
_ROUNDS = 2
_EPOCHS = 1.5  # of replayed steps that recording needs to pay: it takes a forward pass over every example itself


@dataclass(frozen=True)
class StageTimes:
    """Seconds that parts of a run take.

    Attributes:
        steps: of an optimizer step in each stage; ones where nothing can be timed.
        uncached: the same, without the boundary cache.
        head: of an optimizer step in which the head alone trains; None where nothing can be timed.
        evaluation: of an evaluation, roughly.
        checkpoint: of a checkpoint, roughly.
    """

    steps: list[float]
    uncached: list[float]
    head: float | None
    evaluation: float
    checkpoint: float

    def without_cache(self) -> StageTimes:
        return replace(self, steps=self.uncached)


def take(trainer: RunningTrainer, plan: Plan) -> StageTimes:
    """Time a batch in each stage; model and random numbers stay as they are. Called by all processes.

    Args:
        trainer: about to train.
        plan: of the run.
    """
    trainer.boundary.decide()
    checkpoint = _checkpoint_bytes(trainer, plan) / _DISK
    if not is_numbered(trainer.train_dataset) or trainer.is_fsdp_enabled:
        ones = [1.0] * len(plan.stages)
        return StageTimes(ones, ones, None, 0.0, checkpoint)
    source = trainer.boundary.sources[TRAINING]
    numbers = _typical(trainer, len(source.dataset))
    accumulation = trainer.args.gradient_accumulation_steps
    with untouched(trainer.model):
        batch = trainer.boundary.sources.load(source, numbers)
        uncached = [_seconds(trainer, stage, batch) * accumulation for stage in plan.stages]
        head = _seconds(trainer, _head_of(plan), batch) * accumulation
        evaluation = _evaluation(trainer, batch, len(numbers))
    steps = [one * _share(trainer, i) for i, one in enumerate(uncached)]
    return StageTimes(steps, uncached, head, evaluation, checkpoint)


def _typical(trainer: RunningTrainer, total: int) -> list[int]:
    """Numbers of the examples of a batch like most: from all over the dataset, or of the mean length."""
    size = min(trainer._train_batch_size, total)
    if not trainer.bucketing.on:
        return [i * total // size for i in range(size)]
    lengths = trainer.length_sampler().lengths.double()
    ordered = lengths.sort().indices.tolist()
    first = int((lengths < lengths.mean()).sum()) - size // 2
    first = max(0, min(first, total - size))
    return ordered[first : first + size]


def _seconds(trainer: RunningTrainer, stage: Stage, batch: dict[str, Any]) -> float:
    """The shortest of some times: what else the machine does only adds to them."""
    with trainer.unfreezing.training_as_in(stage):
        return min(trial.seconds_of_step(trainer, batch) for _ in range(_ROUNDS))


def _head_of(plan: Plan) -> Stage:
    """The stage that trains least: of one, its topmost group alone."""
    least = min(plan.stages, key=lambda stage: len(stage.trainable))
    return replace(least, trainable=least.trainable[-1:], rates=least.rates[-1:], highest=())


def _evaluation(trainer: RunningTrainer, batch: dict[str, Any], size: int) -> float:
    """Seconds of an evaluation, from one of its batches; from the training batch where there are several sets."""
    sources, data, world = trainer.boundary.sources, trainer.eval_dataset, trainer.args.world_size
    if is_numbered(data) and not isinstance(data, dict):
        total, size = len(data), min(trainer.args.eval_batch_size, len(data))
        batch = sources.load(sources[VALIDATION], [i * total // size for i in range(size)])
    seconds = min(trial.seconds_of_outputs(trainer, batch) for _ in range(_ROUNDS))
    return seconds * math.ceil(_count(data) / (size * world))


def _share(trainer: RunningTrainer, index: int) -> float:
    """What the boundary cache leaves of a step's time."""
    if index >= len(trainer.boundary.entries):
        return 1.0
    entry = trainer.boundary.entries[index]
    return min(1.0, entry.top / entry.full) if entry.off is None and entry.full else 1.0


def _count(data: Any) -> int:
    """Examples of the evaluation set, or of all of them."""
    sets = data.values() if isinstance(data, dict) else [data]
    return sum(len(one) for one in sets if isinstance(one, Sized))


def _checkpoint_bytes(trainer: RunningTrainer, plan: Plan) -> int:
    """The model, and two states of every parameter that trains at the end."""
    parameters = dict(trainer.model.named_parameters())
    trains = trainer.unfreezing.trains(plan.stages[-1])
    sizes = {name: p.numel() * p.element_size() for name, p in parameters.items()}
    return sum(sizes.values()) + 2 * sum(sizes[name] for name in trains)


def turn_off_cache(trainer: RunningTrainer, fraction: float) -> bool:
    """Turn the boundary cache off where it does not pay; whether that was so.

    Args:
        trainer: about to train.
        fraction: of the planned epochs that the budget leaves.
    """
    cached = [entry for entry in trainer.boundary.entries if entry.off is None]
    left = sum(entry.epochs for entry in cached) * fraction
    if not cached or fraction >= 1 or left >= _EPOCHS:
        return False
    why = f"the budget leaves {left:.2g} epochs of it, and recording alone would take as long as one"
    trainer.boundary.turn_off(Off(OffReason.NOT_RECORDED, why))
    return True
