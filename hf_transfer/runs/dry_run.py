"""A dry step of each stage on a few real examples: what autograd saves, what gets a gradient, what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hf_transfer.analysis.budget import Activations
from hf_transfer.features.batches import Batch
from hf_transfer.runs.preflight_examples import Examples
from hf_transfer.runs.preflight_stages import Step
from hf_transfer.training.trainer import TransferTrainer

# torch's counter knows the attention of GPUs only; (operation, arguments that are shapes, formula).
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_ON_CPU = ((_ATTENTION, 3, sdpa_flop_count), (f"{_ATTENTION}_backward", 4, sdpa_backward_flop_count))


@dataclass(frozen=True)
class DryStep:
    """What a training step of a stage on the longest examples showed.

    Attributes:
        parameters: names of those that get a gradient.
        activations: that autograd saves.
        forward: floating-point operations of a forward pass on one example.
        backward: the same of the backward pass.
    """

    parameters: frozenset[str]
    activations: Activations
    forward: int
    backward: int


def dry_steps(trainer: TransferTrainer, train: Examples, steps: list[Step]) -> list[DryStep]:
    """A dry step of each stage; model, trainer and random numbers must be restored by the caller.

    Stages that train the same are tried once. Two batches of different sizes tell what grows with the batch: one
    example and two, and one more of each where BatchNorm normalizes by the batch.
    """
    tried: dict[tuple[frozenset[str], bool], DryStep] = {}
    found = []
    for step in steps:
        key = step.parameters, bool(step.batch_norms)
        if key not in tried:
            tried[key] = _dry_step(trainer, train, step, least=2 if step.batch_norms else 1)
        found.append(tried[key])
    return found


def _dry_step(trainer: TransferTrainer, train: Examples, step: Step, least: int) -> DryStep:
    longest = train.longest(1)
    smaller, larger = (train.batch(longest * count) for count in (least, least + 1))
    with step.training():
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        counter = _counter()
        with counter:
            loss, few = _forward(trainer, smaller)
            forward = int(counter.get_total_flops())
            reaches = bool(parameters) and loss.requires_grad
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if reaches else [None] * len(names)
        both = int(counter.get_total_flops())
        del loss
        _, more = _forward(trainer, larger)
    per_example = more - few
    return DryStep(
        frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None),
        Activations(max(0, few - least * per_example), per_example),
        forward // least,
        (both - forward) // least,
    )


def _counter() -> FlopCounterMode:
    """Counts floating-point operations, also of attention on the CPU."""
    known = {
        getattr(torch.ops.aten, name): lambda *shapes, count=count, formula=formula, **_: formula(*shapes[:count])
        for name, count, formula in _ON_CPU
        if hasattr(torch.ops.aten, name)
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def _forward(trainer: TransferTrainer, batch: Batch) -> tuple[torch.Tensor, int]:
    """(loss, bytes that autograd saves besides the model itself)."""
    model = trainer.model
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor.detach()  # the graph would hold itself where an operation saves its own output

    def give(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    model.train()
    with saved_tensors_hooks(keep, give), trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        result: Any = trainer.compute_loss(model, dict(batch), return_outputs=True)
    return result[0], sum(saved.values())
