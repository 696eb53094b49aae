"""Data parallelism in stages: each stage gets its own DistributedDataParallel gradient reducer.

A reducer handles the parameters that required a gradient when it was built. One built for all parameters waits for
gradients that never come (or, with `find_unused_parameters`, traverses the graph at every step and reduces zeros). One
built while the backbone was frozen does not reduce layers unfrozen later, and ranks diverge. A reducer per stage needs
no traversal: parameters that the loss does not reach (a mask token, say) are found once, and left out.
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
    """The data-parallel wrapper within a prepared, possibly compiled model; None if there is none."""
    inner = model._orig_mod if is_compiled_module(model) else model
    return inner if isinstance(inner, DistributedDataParallel) else None


def build_reducer(
    ddp: DistributedDataParallel, handler: Any, left_out: Collection[str], find_unused_parameters: bool
) -> None:
    """Rebuild the reducer of `ddp` for the parameters that require a gradient now.

    In place, so that references to the wrapped model stay valid.

    Args:
        ddp: the wrapper.
        handler: accelerate's `DistributedDataParallelKwargs`, or None.
        left_out: names of parameters that are not reduced, and of buffers that are not broadcast before each forward.
        find_unused_parameters: whether to traverse the graph at every step.
    """
    module, syncs = ddp.module, ddp.require_backward_grad_sync
    kwargs = handler.to_kwargs() if handler is not None else {}
    # All ranks already have the same weights, so there is nothing to send at the beginning.
    kwargs |= {"find_unused_parameters": find_unused_parameters, "init_sync": False}
    with _ignoring(module, left_out):
        DistributedDataParallel.__init__(
            ddp, module, device_ids=ddp.device_ids, output_device=ddp.output_device, **kwargs
        )
    ddp.require_backward_grad_sync = syncs  # this may run inside `no_sync`
    if handler is not None:
        handler.register_comm_hook(ddp)


@contextlib.contextmanager
def _ignoring(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within the context, DDP leaves out these names: torch reads them from an attribute, at construction only."""
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
    parameters, seen = set[int](), set[Any]()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            parameters.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return parameters


def on_any_rank(flags: Collection[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is true on any rank. All ranks must call it."""
    values = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [value > 0 for value in values.tolist()]


def share_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's buffers to all ranks. All ranks must call it."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
