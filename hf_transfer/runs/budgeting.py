"""What a run takes in memory, time and money, from its trainer and a dry step of each stage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_transfer.adapters.attach import is_adapted, saved_parameters
from hf_transfer.analysis.budget import Trained, memory_of, without_kernels
from hf_transfer.analysis.budget_report import Budget
from hf_transfer.analysis.gpus import Work, offers
from hf_transfer.analysis.hints import computed_tokens
from hf_transfer.analysis.prices import Prices
from hf_transfer.config.arguments.forgetting import PENALTIES
from hf_transfer.errors import listed, one_line
from hf_transfer.features.examples import is_numbered
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.runs import trainings
from hf_transfer.runs.dry_run import DryStep, dry_steps
from hf_transfer.runs.preflight import checkpoints_activations, without_trace
from hf_transfer.runs.preflight_examples import Examples, examples_of
from hf_transfer.runs.preflight_stages import Step, batch_sizes_and_steps
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training import contrastive
from hf_transfer.training.cache_stage import CachedStage
from hf_transfer.training.trainer import TransferTrainer

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
# Keys that hold more weights than the model's: an average, the weights at the start, a teacher.
_COPIES = ("ema_decay", *PENALTIES)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Dry:
    """What the dry steps showed.

    Attributes:
        stages: what trains in each.
        operations: of all training steps; None where they are not known.
    """

    stages: list[Trained]
    operations: float | None


def budget_of(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], prices: Prices) -> Budget:
    """The budget of a run; model, trainer and random numbers stay as they are.

    Args:
        prepared: data and model.
        trainer: made for them, with its plan resolved and its boundary cache decided.
        splits: prepared examples by split.
        prices: the GPUs.
    """
    notes = list[str]()
    if contrastive.wanted(trainer.args):
        notes.append("the contrastive stage is not counted")
    if trainings.are_wanted(trainer.args):
        count = 1 + trainings.more(prepared)
        notes.append(f"times and costs are of one of {count} trainings (refit), and copies of weights are not counted")
    dry = _dry(prepared, trainer, splits, notes)
    budget = _budget(trainer, dry, prices, notes, trainer._train_batch_size)
    return replace(budget, device=trainer.args.device.type if dry.stages[0].activations else "")


def budget_of_model(args: Any, model: Any, groups: Sequence[LayerGroup], plan: Plan, prices: Prices) -> Budget:
    """What is known without data: parameters, gradients and optimizer.

    Args:
        args: training arguments.
        model: with its adapter; may be on the meta device.
        groups: its layer groups.
        plan: of the run.
        prices: the GPUs.
    """
    required = {name for name, p in model.named_parameters() if p.requires_grad}
    stages = [Trained(stage.name, required & _trained(stage, groups)) for stage in plan.stages]
    notes = ["without data, activations and time are not known"]
    stand_in = _Options(args, model)
    return _budget(stand_in, _Dry(stages, None), prices, notes, args.per_device_train_batch_size)


def _trained(stage: Stage, groups: Sequence[LayerGroup]) -> set[str]:
    return {name for group in groups for name in group.parameters if stage.rate(group.name, name) > 0}


@dataclass(frozen=True)
class _Options:
    """The part of a trainer that tells what its optimizer is."""

    args: Any
    model: Any
    optimizer_cls_and_kwargs: Any = None

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any) -> Any:
        return TransferTrainer.get_optimizer_cls_and_kwargs(args, model)


def _budget(trainer: Any, dry: _Dry, prices: Prices, notes: list[str], batch: int) -> Budget:
    args, model = trainer.args, trainer.model
    cls, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, model)
    adapter = saved_parameters(model) if is_adapted(model) else ()
    memory = memory_of(model, dry.stages, partial(cls, **without_kernels(options)), batch, adapter)
    if memory[0].optimizer is None:
        optim = getattr(args.optim, "value", args.optim)
        notes.append(f"what optim: {optim} keeps is not known without a step on the data, and is not counted")
    if copies := [name for name in _COPIES if getattr(args, name)]:
        notes.append(
            f"the copies of weights that {' and '.join(copies)} keep{'s' * (len(copies) == 1)} are not counted"
        )
    dtype = next(model.parameters()).dtype
    work = Work(dry.operations, args.bf16 or args.fp16 or dtype in _HALF, args.bf16 or dtype is torch.bfloat16)
    accumulation = args.gradient_accumulation_steps
    choices = offers(memory, work, prices, accumulation)
    return Budget(tuple(memory), accumulation, "", work, prices, tuple(choices), notes)


# ---- dry steps -----------------------------------------------------------------------------------------------------


def _dry(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], notes: list[str]) -> _Dry:
    """Dry steps of all stages; without them, what the plan says alone."""
    assert trainer.plan is not None and trainer.unfreezing is not None, "there is a plan"
    plan, caches = trainer.plan, trainer.boundary.entries
    if trainer._solves:
        notes.append("the head is solved for on frozen features: nothing has a gradient, and no step is taken")
        return _unknown(plan, [()] * len(plan.stages), caches)
    trains = [trainer.unfreezing.trains(stage) for stage in plan.stages]
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        notes.append("the model counts as a whole, although it will be sharded, and activations are not known")
        return _unknown(plan, trains, caches)
    try:
        with without_trace(trainer):
            train = examples_of(prepared, trainer, splits)["train"]
            _, steps = batch_sizes_and_steps(trainer)
            dry = dry_steps(trainer, train, steps)
    except _FAILURES as error:
        notes.append(f"no dry step could be taken ({one_line(error, 120)}), so activations and time are not known")
        return _unknown(plan, trains, caches)
    if bounds := [f"{stage.name!r}" for stage, one in zip(plan.stages, dry, strict=True) if one.is_bound]:
        notes.append(
            f"to save time, activations and operations of {listed(bounds)} are those of a stage with more layers"
        )
    repeats = checkpoints_activations(trainer.args)
    if repeats:
        notes.append("what activation checkpointing keeps is not known, so activations are not counted")
    stages = [
        Trained(stage.name, one.parameters, None if repeats else one.activations, _kept(caches, i))
        for i, (stage, one) in enumerate(zip(plan.stages, dry, strict=True))
    ]
    if plan.waits:
        notes.append("stages end at plateaus, so the time is not known")
        return _Dry(stages, None)
    return _Dry(stages, _operations(trainer, train, steps, dry, repeats))


def _unknown(plan: Plan, trains: Sequence[Collection[str]], caches: Sequence[CachedStage]) -> _Dry:
    stages = [
        Trained(stage.name, names, None, _kept(caches, i))
        for i, (stage, names) in enumerate(zip(plan.stages, trains, strict=True))
    ]
    return _Dry(stages, None)


def _kept(caches: Sequence[CachedStage], index: int) -> int:
    """Bytes that the boundary cache keeps in a stage."""
    return caches[index].nbytes if _is_cached(caches, index) else 0


def _is_cached(caches: Sequence[CachedStage], index: int) -> bool:
    return index < len(caches) and caches[index].off is None and caches[index].cut is not None


def _operations(
    trainer: TransferTrainer, train: Examples, steps: Sequence[Step], dry: Sequence[DryStep], repeats: bool
) -> float:
    """Floating-point operations of all training steps.

    The dry steps are on the longest example; texts count by their tokens, padding included. A backward pass takes twice
    the operations of the forward pass of the same layers, so what remains of a forward pass is that of frozen layers,
    which the boundary cache leaves out, but for one pass in which it records.

    Args:
        trainer: with its plan resolved.
        train: the training examples.
        steps: of the stages.
        dry: what they showed.
        repeats: whether the forward pass is computed again in the backward pass.
    """
    plan, caches, args = trainer.plan, trainer.boundary.entries, trainer.args
    assert plan is not None
    ends = [*(stage.start for stage in plan.stages[1:]), trainer.num_steps]
    per_step: float = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if is_numbered(trainer.train_dataset):  # a stream has no length
        per_step = len(train) / trainer.steps_per_epoch
    total, records = 0.0, 0.0
    for i, (stage, end, one) in enumerate(zip(plan.stages, ends, dry, strict=True)):
        frozen = max(0.0, one.forward - one.backward / 2)
        each: float = one.forward * (2 if repeats else 1) + one.backward
        if _is_cached(caches, i):
            records = max(records, frozen * len(train))
            each -= frozen
        total += ((end or 0) - (stage.start or 0)) * per_step * each
    return (total + records) * _share_of_longest(trainer, train)


def _share_of_longest(trainer: TransferTrainer, train: Examples) -> float:
    """Tokens of an example of the training set, padding included, relative to the longest; 1 for images."""
    if train.lengths is None:
        return 1.0
    lengths = torch.as_tensor(train.lengths)
    mean = computed_tokens(lengths, trainer.args.train_batch_size, trainer.bucketing.on) / len(lengths)
    return min(1.0, mean / float(lengths.max()))
