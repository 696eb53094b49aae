"""Preflight: the stages of a run, what trains in each, and the sizes of the batches that it will see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerate.data_loader import DataLoaderDispatcher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_transfer.features.examples import is_numbered
from hf_transfer.plan.plan import Stage
from hf_transfer.training.trainer import TransferTrainer


@dataclass(frozen=True)
class Step:
    """A training step in a stage of the plan; without a plan, in the run.

    Attributes:
        trainer: whose step it is.
        stage: of the plan; None without one.
        parameters: names of what trains.
        reaches_end: whether the stage trains on the last batch of an epoch.
    """

    trainer: TransferTrainer
    stage: Stage | None
    parameters: frozenset[str]
    reaches_end: bool

    @property
    def where(self) -> str:
        return "" if self.stage is None else f" in stage {self.stage.name!r}"

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Context in which exactly what this stage trains requires a gradient."""
        if self.stage is None or self.trainer.unfreezing is None:
            return contextlib.nullcontext()
        return self.trainer.unfreezing.training_as_in(self.stage)

    @property
    def batch_norms(self) -> set[nn.Module]:
        """The BatchNorm layers that normalize by the batch in this stage."""
        frozen: set[nn.Module] = set()
        with self.training():
            if self.trainer.unfreezing is not None:
                frozen |= set(self.trainer.unfreezing.frozen)
        return {m for m in self.trainer.model.modules() if isinstance(m, _BatchNorm) and m not in frozen}


@dataclass(frozen=True)
class BatchSizes:
    """Examples of this process in a full training batch, and in the last batch of an epoch."""

    full: int
    last: int


def batch_sizes_and_steps(trainer: TransferTrainer) -> tuple[BatchSizes, list[Step]]:
    """The batches of the trainer's own loader, and a step of each stage, in order."""
    loader = trainer.get_train_dataloader()
    sizes = BatchSizes(trainer._train_batch_size, trainer._train_batch_size)
    if is_numbered(trainer.train_dataset) and not isinstance(loader, DataLoaderDispatcher):  # a stream never ends
        counts = [len(numbers) for numbers in loader.batch_sampler]
        sizes = BatchSizes(counts[0], counts[-1])
    max_steps = trainer.set_initial_training_values(trainer.args, loader)[-1]
    per_epoch, plan, unfreezing = trainer.steps_per_epoch, trainer.plan, trainer.unfreezing
    if plan is None or unfreezing is None:
        names = frozenset(name for name, p in trainer.model.named_parameters() if p.requires_grad)
        return sizes, [Step(trainer, None, names, max_steps >= per_epoch)]
    steps = []
    for stage, following in zip(plan.stages, (*plan.stages[1:], None), strict=True):
        if plan.waits or stage.start is None:
            reaches_end = max_steps >= per_epoch
        else:
            end = max_steps if following is None or following.start is None else following.start
            reaches_end = end // per_epoch > stage.start // per_epoch
        steps.append(Step(trainer, stage, frozenset(unfreezing.trains(stage)), reaches_end))
    return sizes, steps


def covering(steps: Sequence[Step]) -> Iterator[Step]:
    """The first step, and as few others as train together what any of them trains."""
    yield steps[0]
    covered = set(steps[0].parameters)
    for step in sorted(steps[1:], key=lambda step: -len(step.parameters)):
        if not step.parameters <= covered:
            covered |= step.parameters
            yield step
