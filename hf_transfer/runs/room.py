"""Does training fit the memory of this machine? Asked before there is a trainer, and of its plan once there is one.

Parameters, gradients and optimizer states are exact, as in `analysis.budget`. Activations of one example count where
they decide: fewer examples in a batch, with accumulation, are the same training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from hf_transfer.adapters.targets import targets
from hf_transfer.analysis.budget import OVERHEAD, StageMemory, Trained, memory_of, without_kernels
from hf_transfer.analysis.budget_report import SAVINGS, in_bytes
from hf_transfer.errors import UserError
from hf_transfer.features.budget import available_memory
from hf_transfer.layers.side_effects import untouched
from hf_transfer.runs.dry_run import saved_bytes
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.solvable import groups_of
from hf_transfer.tasks.base import spread
from hf_transfer.training.trainer import TransferTrainer

_ADAPTER = 0.2  # of the parameters: what an adapter, its gradients and optimizer states may take
_SAMPLE = 64  # examples, of which the longest is tried
_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_ASK = frozenset({"adapter", "pooling", "pooling_layer", "stages"})  # given, they say what trains or is read
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, UserError)


@dataclass(frozen=True)
class Room:
    """Memory of this machine, in bytes.

    Attributes:
        device: type of the device that trains.
        free: what training may take; None where it is not known.
        holds_model: whether the model is in this memory already, so that `free` is without it.
    """

    device: str
    free: int | None
    holds_model: bool

    @property
    def where(self) -> str:
        return f"on {self.device}" if self.device != "cpu" else "of this machine's memory"


def room(args: Any) -> Room:
    """The memory that one process may take on the device that trains, before the model is moved there."""
    kind = args.device.type
    if kind == "cpu":
        return Room(kind, available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), holds_model=True)
    if kind == "cuda":
        return Room(kind, max(0, torch.cuda.mem_get_info(args.device)[0] - OVERHEAD), holds_model=False)
    return Room(kind, None, holds_model=False)


# ---- before there is a trainer -------------------------------------------------------------------------------------


def no_room(prepared: Prepared) -> str:
    """Why not all layers can be trained while an adapter can, as part of a sentence; empty if they can.

    The same on all processes: what does not fit one of them fits none.
    """
    config = prepared.config
    is_sharded = any(os.environ.get(name, "").lower() in ("1", "true") for name in _SHARDED)
    if is_sharded or config.given & _ASK or config.values["from_scratch"] or prepared.loaded.grown:
        return ""
    reason = _no_room(prepared, room(config.training))
    return next(filter(None, gather_object([reason])), "") if config.training.world_size > 1 else reason


def _no_room(prepared: Prepared, given: Room) -> str:
    args, model = prepared.config.training, prepared.loaded.model
    if given.free is None:
        return ""
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        (needed,) = memory(args, model, None, [Trained("all groups", everything)])
    except (ImportError, ValueError):  # the trainer tells what the optimizer lacks
        return ""
    taken = _without_model(needed, given)
    if taken <= given.free / 2:  # what autograd saves of one example is far less
        return ""
    activations = _of_one_example(prepared) if taken <= given.free else 0
    adapted = (0 if given.holds_model else needed.parameters + needed.buffers) + _ADAPTER * needed.parameters
    if taken + activations <= given.free or adapted + activations > given.free or not _takes_adapter(prepared):
        return ""
    of_one = f" and {in_bytes(activations)} for one example" if activations else ""
    return f"training all layers takes {in_bytes(taken)}{of_one}, and {in_bytes(given.free)} {given.where} are free"


def _takes_adapter(prepared: Prepared) -> bool:
    try:
        return bool(targets(prepared.loaded.model, groups_of(prepared), "LORA"))
    except UserError:
        return False


def _of_one_example(prepared: Prepared) -> int:
    """Bytes that autograd saves of the longest of a few examples; 0 where the model cannot be asked."""
    task, model = prepared.task, prepared.loaded.model
    try:
        sample = task.prepare(
            spread(prepared.data.train, _SAMPLE), prepared.inputs, prepared.processor, prepared.config.data
        )
        lengths = [len(ids) for ids in sample["input_ids"]] if "input_ids" in sample.column_names else [0]
        batch = task.collator(prepared.processor)([sample[lengths.index(max(lengths))]])
        with untouched(model):
            return saved_bytes(model, lambda: model.eval()(**batch))[1]
    except _FAILURES:
        return 0


# ---- of a trainer --------------------------------------------------------------------------------------------------


def too_large(trainer: TransferTrainer) -> Iterator[str]:
    """A line if the largest stage does not fit this machine, even without activations."""
    needed, given = _largest(trainer), room(trainer.args)
    if needed is None or given.free is None:
        return
    holds_model = next(trainer.model.parameters()).device.type == given.device
    given = Room(given.device, given.free, holds_model)
    if (taken := _without_model(needed, given)) > (given.free or 0):
        besides = " besides the model" if given.holds_model else ""
        yield (
            f"stage {needed.stage!r} takes {in_bytes(taken)}{besides}, activations not counted, and "
            f"{in_bytes(given.free or 0)} {given.where} are free. What saves memory: {SAVINGS}."
        )


def memory_line(trainer: TransferTrainer) -> str:
    """What the largest stage takes besides activations; empty where nothing takes steps, or the model is sharded."""
    needed = _largest(trainer)
    if needed is None:
        return ""
    unknown = "" if needed.optimizer is not None else " (the optimizer's states are not known)"
    return (
        f"Memory: {in_bytes(needed.without_activations)} of weights, gradients and optimizer states{unknown}, besides "
        "activations; `hf-transfer plan` with the same keys estimates these, the time and the costs."
    )


def _largest(trainer: TransferTrainer) -> StageMemory | None:
    """The stage that takes most, without activations; None where that is not known."""
    plan = trainer.plan
    if plan is None or trainer.unfreezing is None or trainer.is_fsdp_enabled:
        return None
    if trainer._solves or trainer.is_deepspeed_enabled:
        return None
    stages = [Trained(stage.name, trainer.unfreezing.trains(stage)) for stage in plan.stages]
    return max(memory(trainer.args, trainer.model, trainer, stages), key=lambda one: one.total())


def memory(args: Any, model: Any, trainer: Any, stages: list[Trained]) -> list[StageMemory]:
    """Parameters, gradients and optimizer states by stage."""
    known = trainer.optimizer_cls_and_kwargs if trainer is not None else None
    cls, options = known or TransferTrainer.get_optimizer_cls_and_kwargs(args, model)
    return memory_of(model, stages, partial(cls, **without_kernels(options)), args.per_device_train_batch_size)


def _without_model(needed: StageMemory, given: Room) -> int:
    return needed.total() - (needed.parameters + needed.buffers if given.holds_model else 0)
