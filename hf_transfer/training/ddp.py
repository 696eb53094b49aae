"""Data parallelism over what trains: the gradient reducer of DistributedDataParallel, built anew for each stage.

A reducer reduces the parameters that required a gradient when it was built. One built for everything waits for
gradients that never come (or, with `find_unused_parameters`, walks the whole graph at every step and reduces zeros);
one built while the backbone was frozen leaves what thaws later to each rank alone. So each stage gets its own, without
the walk: the parameters that the loss does not reach (a mask token, say) are found once, and left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_compiled_module
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: Any) -> DistributedDataParallel | None:
    """The data-parallel wrapper in a prepared model, which may have been compiled; None where there is none."""
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, DistributedDataParallel) else None


def build_reducer(
    ddp: DistributedDataParallel, handler: Any, left_out: Collection[str], find_unused_parameters: bool
) -> None:
    """Build `ddp`'s reducer for what requires a gradient now.

    In place, so that every reference to the wrapped model stays valid.

    Args:
        ddp: the wrapper.
        handler: accelerate's `DistributedDataParallelKwargs`, or None.
        left_out: names of parameters that are not reduced, and of buffers that are not broadcast before each forward.
        find_unused_parameters: walk the graph at every step.
    """
    module, syncs = ddp.module, ddp.require_backward_grad_sync
    kwargs = handler.to_kwargs() if handler is not None else {}
    # The ranks are equal already, so nothing is sent at the beginning.
    kwargs |= {"find_unused_parameters": find_unused_parameters, "init_sync": False}
    with _ignoring(module, left_out):
        DistributedDataParallel.__init__(
            ddp, module, device_ids=ddp.device_ids, output_device=ddp.output_device, **kwargs
        )
    ddp.require_backward_grad_sync = syncs  # we may be inside `no_sync`
    if handler is not None:
        handler.register_comm_hook(ddp)


@contextlib.contextmanager
def _ignoring(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """torch reads what to leave out from an attribute of the module, at construction only."""
    attribute = "_ddp_params_and_buffers_to_ignore"
    before = vars(module).get(attribute)
    setattr(module, attribute, [*(before or ()), *names])
    try:
        yield
    finally:
        delattr(module, attribute)
        if before is not None:
            setattr(module, attribute, before)


def reached(loss: torch.Tensor) -> set[int]:
    """`id()` of each parameter that the gradient of `loss` flows to."""
    found, seen = set[int](), set[Any]()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found


def on_any_rank(flags: Collection[bool], device: torch.device) -> list[bool]:
    """Element by element, whether it is true on any rank."""
    values = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [value > 0 for value in values.tolist()]


def share_buffers(model: nn.Module) -> None:
    """Give all ranks rank 0's buffers."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def without_a_trace(model: nn.Module) -> Iterator[None]:
    """A forward pass in here leaves buffers and random numbers as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
