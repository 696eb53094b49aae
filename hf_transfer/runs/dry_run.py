"""A dry step of each stage on a few real examples: what autograd saves, what gets a gradient, what is computed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hf_transfer.analysis.budget import Activations
from hf_transfer.features.batches import Batch
from hf_transfer.runs.preflight_examples import Examples
from hf_transfer.runs.preflight_stages import Step
from hf_transfer.training.trainer import TransferTrainer

LIMIT = 3.0  # seconds, after which stages are no longer tried
_LITTLE = 0.01  # of an example: what is saved whatever the batch, and then is not measured again
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
        is_bound: whether another stage was tried in its place, which takes at least as much.
    """

    parameters: frozenset[str]
    activations: Activations
    forward: int
    backward: int
    is_bound: bool = False


def dry_steps(trainer: TransferTrainer, train: Examples, steps: list[Step]) -> list[DryStep]:
    """A dry step of each stage; model, trainer and random numbers must be restored by the caller.

    Stages that train the same are tried once, the one that trains most first. After `LIMIT` seconds, a stage counts as
    the smallest that was tried and trains the same and more, which takes at least as much.
    """
    tried: dict[tuple[frozenset[str], bool], DryStep] = {}
    found: dict[int, DryStep] = {}
    fixed: int | None = None
    began = time.perf_counter()
    for i in spread(sorted(range(len(steps)), key=lambda i: -len(steps[i].parameters))):
        key = steps[i].parameters, bool(steps[i].batch_norms)
        wider = [names_norms for names_norms in tried if names_norms[0] >= key[0]]
        if key in tried:
            found[i] = tried[key]
        elif wider and time.perf_counter() - began > LIMIT:
            smallest = min(wider, key=lambda names_norms: len(names_norms[0]))
            found[i] = replace(tried[smallest], parameters=key[0], is_bound=True)
        else:
            found[i] = tried[key] = one = _dry_step(trainer, train, steps[i], fixed)
            is_first = len(tried) == 1  # in another, what is saved of a large layer may be new
            if is_first and one.activations.fixed <= _LITTLE * one.activations.per_example:
                fixed = one.activations.fixed
    return [found[i] for i in range(len(steps))]


def spread(order: list[int]) -> Iterator[int]:
    """The first and the last, then what is halfway between those before, and so on."""
    yield from order[:1]
    yield from order[1:][-1:]
    waiting = [(0, len(order) - 1)]
    while waiting:
        low, high = waiting.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            yield order[middle]
            waiting += [(low, middle), (middle, high)]


def _dry_step(trainer: TransferTrainer, train: Examples, step: Step, fixed: int | None) -> DryStep:
    """A dry step of one stage.

    Args:
        trainer: whose stage it is.
        train: the training examples.
        step: of the stage.
        fixed: bytes that are saved whatever the batch; None to tell them by a second batch of one example more.
    """
    longest, least = train.longest(1), 2 if step.batch_norms else 1  # BatchNorm may need several values
    with step.training(), _AsOnGpu() if trainer.args.device.type == "cpu" else contextlib.nullcontext():
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        with _counter() as counter:
            loss, few = _forward(trainer, train.batch(longest * least))
            forward = int(counter.get_total_flops())
            reaches = bool(parameters) and loss.requires_grad
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if reaches else [None] * len(names)
        both = int(counter.get_total_flops())
        del loss
        if fixed is None:
            per_example = _forward(trainer, train.batch(longest * (least + 1)))[1] - few
            fixed = max(0, few - least * per_example)
    return DryStep(
        frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None),
        Activations(fixed, max(0, few - fixed) // least),
        forward // least,
        (both - forward) // least,
    )


class _AsOnGpu(TorchFunctionMode):
    """Context in which attention on the CPU saves what it saves on a GPU.

    With dropout, only the kernels of GPUs do without the matrix of weights of each head.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0} | dict(zip(("is_causal",), args[5:6], strict=False))
        return func(*args, **kwargs)


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
    trainer.model.train()
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        result, saved = saved_bytes(
            trainer.model, lambda: trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        )
    return result[0], saved


def saved_bytes(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, int]:
    """(what a forward pass returns, bytes that autograd saves in it besides the model itself)."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor.detach()  # the graph would hold itself where an operation saves its own output

    def give(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with saved_tensors_hooks(keep, give):
        result = call()
    return result, sum(saved.values())
