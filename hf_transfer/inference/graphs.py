"""A model as a function from named tensors to logits, traced by `torch.export` with any number of examples and tokens.

All export formats begin with this graph. Nothing here knows an architecture: what depends on the values of a batch, and
not on its shape alone, is an error of the tracer, and is told as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_transfer.errors import UserError, one_line, option
from hf_transfer.layers.forward_pass import REFUSALS

LOGITS = "logits"
BATCH_AXIS, LENGTH_AXIS = 0, 1


class Logits(nn.Module):
    """A model as a function of tensors in the order of `names`; returns (examples, outputs) logits in float32.

    Args:
        model: in eval mode.
        names: of its inputs.
        dtype: of its weights; inputs that are floats are cast to it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.names, self.dtype = model, tuple(names), dtype

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in zip(self.names, tensors, strict=True)
        }
        logits: torch.Tensor = self.model(**given).logits
        return logits.float()


def traced(module: Logits, batch: dict[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """The graph of a model.

    Args:
        module: on the CPU, in eval mode.
        batch: real inputs by name, at least two examples: (examples, length) of tokens, or (examples, channels, height,
            width) of images. The number of examples and of tokens stays free; the size of images does not.

    Raises:
        UserError: the model cannot be traced, or only for batches of one shape.
    """
    free = tuple(_free_axes(batch[name]) for name in module.names)
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, tuple(batch[name] for name in module.names), dynamic_shapes=(free,), strict=False
            )
    except (*REFUSALS, AssertionError) as error:
        name = type(module.model).__name__
        said = one_line(error).partition(" Caused by")[0][:200].rstrip(".")
        raise UserError(
            f"the model ({name}) cannot be traced for any number of examples and tokens ({said}).",
            f"Its code depends on the values of a batch. Use the run's own folder, or {option('format', 'merged')}.",
            key="RUN",
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which a file would hold
    return program


def _free_axes(tensor: torch.Tensor) -> dict[int, Any]:
    free = {BATCH_AXIS: torch.export.Dim.DYNAMIC}
    return free | ({LENGTH_AXIS: torch.export.Dim.DYNAMIC} if tensor.ndim == 2 else {})
