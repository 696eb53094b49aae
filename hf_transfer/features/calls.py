"""One watched forward pass: which modules of each layer group are called, in which order, with which tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from hf_transfer.features.batches import Batch
from hf_transfer.features.cut import CallKey
from hf_transfer.features.stand_ins import patched
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.groups import LayerGroup

Spot = tuple[CallKey, bool, int]  # (a call, whether its input is meant or its output, index among its leaves)


@dataclass
class Tensor:
    """A floating-point tensor that a module took or returned.

    Attributes:
        spot: where.
        group: index of the module's layer group.
        value: the tensor itself.
        origin: of the tensor in the autograd graph, at that time.
        time: when it was taken or returned, as a count of such events.
    """

    spot: Spot
    group: int
    value: torch.Tensor
    origin: Any
    time: int


@dataclass
class Pass:
    """A forward pass as it was watched.

    Attributes:
        taken: inputs of the calls, by the order in which the calls began; for each call the floating-point tensors.
        returned: outputs, by the order in which the calls ended.
        consumers: (input, channel axis) of layers whose kind says where the channels of their input are.
        output: of the model.
    """

    taken: list[list[Tensor]] = field(default_factory=list)
    returned: list[list[Tensor]] = field(default_factory=list)
    consumers: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    output: Any = None

    @property
    def time(self) -> int:
        """How many calls began or ended so far."""
        return len(self.taken) + len(self.returned)


def outermost_called(model: nn.Module, groups: Sequence[LayerGroup], batch: Batch) -> dict[str, int]:
    """{module: index of its layer group}: the largest modules within one group that a forward pass calls.

    Of the head these are the modules that hold its parameters: what comes before them (pooling) is not the head's.
    """
    called: set[int] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: called.add(id(module))) for m in model.modules()]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    parameters = dict(model.named_parameters())
    group_of = {id(parameters[name]): i for i, group in enumerate(groups) for name in group.parameters}
    heads = {len(groups) - 1} if groups[-1].name == HEAD else set()
    found: dict[str, int] = {}

    def visit(name: str, module: nn.Module) -> None:
        own = {group_of[id(p)] for p in module.parameters() if id(p) in group_of}
        is_whole = not own & heads or any(True for _ in module.parameters(recurse=False))
        if len(own) == 1 and id(module) in called and name and is_whole:
            found[name] = own.pop()
        elif own:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}".lstrip("."), child)

    visit("", model)
    return found


def watch(model: nn.Module, group_of: Mapping[str, int], batch: Batch, gradients: bool = False) -> Pass:
    """A forward pass.

    Args:
        model: in eval mode.
        group_of: {module to watch: index of its group}.
        batch: for the model.
        gradients: whether to keep the autograd graph.
    """
    record = Pass()

    def keep(key: CallKey, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        group = group_of[key[0]]
        record.taken.append(_tensors((key, True), group, (args, kwargs), record.time))
        output = own_forward(*args, **kwargs)
        record.returned.append(_tensors((key, False), group, output, record.time))
        return output

    def consumer(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and torch.is_tensor(inputs[0]) and (axis := _channel_axis(module, inputs[0], output)) is not None:
            record.consumers.append((inputs[0], axis))

    leaves = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [m.register_forward_hook(consumer) for m in leaves]
    try:
        with torch.set_grad_enabled(gradients), patched(model, list(group_of), keep):
            record.output = model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return record


def _tensors(where: tuple[CallKey, bool], group: int, values: Any, time: int) -> list[Tensor]:
    leaves = pytree.tree_leaves(values)
    return [
        Tensor((*where, i), group, leaf, leaf.grad_fn, time)
        for i, leaf in enumerate(leaves)
        if torch.is_tensor(leaf) and leaf.is_floating_point()
    ]


def _channel_axis(module: nn.Module, value: torch.Tensor, output: Any) -> int | None:
    """The axis of the channels in a layer's input, from what the layer computes; None if that does not say."""
    if isinstance(module, nn.Linear):
        return value.dim() - 1
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return 1
    weight = getattr(module, "weight", None)
    if not torch.is_tensor(weight) or weight.dim() != 1:
        return None
    axes = [axis for axis, size in enumerate(value.shape) if axis and size == len(weight)]
    if isinstance(module, nn.LayerNorm) and len(axes) > 1 and torch.is_tensor(output):
        axes = [axis for axis in axes if _normalizes(module, value.detach(), output.detach(), axis)]
    return axes[0] if len(axes) == 1 else None


def _normalizes(module: nn.LayerNorm, value: torch.Tensor, output: torch.Tensor, axis: int) -> bool:
    """Whether a layer norm, or one of its subclasses that take channels first, normalized this axis."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    last = functional.layer_norm(value.movedim(axis, -1), (len(weight),), weight, bias, module.eps)
    expected = last.movedim(-1, axis)
    return expected.shape == output.shape and torch.allclose(expected, output, rtol=1e-3, atol=1e-4)


# ---- the autograd graph ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def all_require_gradients(model: nn.Module) -> Iterator[None]:
    """Within the context, every floating-point parameter requires a gradient."""
    before = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    for parameter, _ in before:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def ancestors(origin: Any) -> set[Any]:
    """The nodes of the autograd graph that a tensor of this origin was computed from, and its own."""
    seen, todo = set[Any](), [origin]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return seen


def parameters_in(nodes: set[Any]) -> set[int]:
    """`id` of the parameters among nodes of the autograd graph."""
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}
