"""Find where a model can be entered above its frozen part, without a line of code per architecture.

The modules in which nothing trains, within layer groups below everything that trains, are *candidates*. Their calls are
traced on small batches of several shapes. Autograd decides which of their outputs the rest of the model depends on: an
output that a gradient reaches is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.features.batches import Batch, equal, length_of, resized
from hf_transfer.features.cut import Call, CallKey, Cut, Dimension, Leaf, Refused
from hf_transfer.features.stand_ins import patched
from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.layers.groups import LayerGroup

_ROWS = (2, 3)  # examples in the traced batches
_LENGTHS = (7, 11)  # token positions in the traced batches

Gradients = Mapping[tuple[CallKey, int], torch.Tensor]  # by (call, index among its outputs)


@dataclass(frozen=True)
class _Output:
    """The output of one traced call.

    Attributes:
        spec: its structure, as a pytree.
        leaves: detached copies of its tensors, and its other values.
        trains: whether anything trainable took part in it.
    """

    spec: Any
    leaves: list[Any]
    trains: bool


Trace = dict[CallKey, _Output]


def boundary(model: nn.Module, groups: Sequence[LayerGroup]) -> int:
    """Index of the first group that holds a parameter which requires a gradient; `len(groups)` if there is none."""
    parameters = dict(model.named_parameters())
    for i, group in enumerate(groups):
        if any(parameters[name].requires_grad for name in group.parameters):
            return i
    return len(groups)


def find_cut(model: nn.Module, groups: Sequence[LayerGroup], batch: Batch, keeping: Collection[str] = ()) -> Cut:
    """Where `model` can be entered, given what requires a gradient now.

    Args:
        model: is left in eval mode; nothing else of it changes.
        groups: its layer groups.
        batch: as the model reads it, on the model's device.
        keeping: names of layers that are in eval mode although they train; see `layers.frozen.frozen_modules`.

    Raises:
        Refused: there is no such place.
    """
    index = boundary(model, groups)
    if index == 0:
        raise Refused(f"{groups[0].name}, the input layer, trains")
    if index == len(groups):
        raise Refused("nothing trains")
    batch = {name: value for name, value in batch.items() if name != "labels"}
    names, maybe_random = _candidates(model, groups[:index], groups, keeping)
    length = length_of(batch)
    shapes = [(_ROWS[0], _LENGTHS[0]), (_ROWS[1], _LENGTHS[0]), *([(_ROWS[0], _LENGTHS[1])] if length else [])]
    batches = [resized(batch, rows, positions) for rows, positions in shapes]
    model.eval()
    random = _random(model, maybe_random, batches[0])
    names = [name for name in names if name not in random]
    best = _cut_at(model, names, batches, shapes)
    modules = dict(model.named_modules())
    for name in {key[0] for key, _, _ in best.stored.values()}:
        if not any(True for _ in modules[name].parameters()):  # pooling takes less room than its input; others do not
            others = [other for other in names if other != name]
            cut = _cut_at(model, others, batches, shapes)
            if cut.nbytes(length) <= best.nbytes(length):
                best, names = cut, others
    return best


def _cut_at(model: nn.Module, names: Sequence[str], batches: Sequence[Batch], shapes: Sequence[tuple[int, int]]) -> Cut:
    """The cut with stand-ins for the named modules only; `shapes` are (examples, positions) of the batches."""
    traces = [_trace(model, names, batch) for batch in batches]
    frozen_calls = [key for key, output in traces[0].items() if not output.trains]
    for trace in traces[1:]:
        if [key for key, output in trace.items() if not output.trains] != frozen_calls:
            raise Refused("the batch decides which of the frozen modules are called")
    calls = {key: _call(key, [trace[key] for trace in traces], shapes) for key in frozen_calls}
    gradients, reads = _gradients(model, names, traces, batches)
    return Cut(_with_roles(calls, gradients, traces[0]), reads)


# ---- candidates ------------------------------------------------------------------------------------------------------


def _candidates(
    model: nn.Module, below: Sequence[LayerGroup], groups: Sequence[LayerGroup], keeping: Collection[str]
) -> tuple[list[str], set[str]]:
    """(candidates, those of them that may be random).

    Candidates are the largest modules within the groups `below`, and all modules without parameters or children. The
    latter may be random if they are in train mode while the model trains.
    """
    parameters = dict(model.named_parameters())
    inside = {id(parameters[name]) for group in below for name in group.parameters}
    frozen = {id(module) for module in frozen_modules(model, groups, keeping)}
    candidates, maybe_random = list[str](), set[str]()

    def visit(name: str, module: nn.Module) -> None:
        own = list(module.parameters())
        has_forward = type(module).forward is not nn.Module.forward  # a ModuleList has none
        if own and has_forward and all(id(p) in inside for p in own):
            candidates.append(name)
        elif not own and not any(True for _ in module.children()):
            candidates.append(name)
            if id(module) not in frozen:
                maybe_random.add(name)
        else:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}".lstrip("."), child)

    visit("", model)
    return candidates, maybe_random


def _random(model: nn.Module, names: set[str], batch: Batch) -> set[str]:
    """Those of the modules, which have no parameters, that differ in train mode, draw random numbers or have state."""
    modules, random = dict(model.named_modules()), set[str]()
    device = next(model.parameters()).device

    def compare(key: CallKey, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, in_eval = modules[key[0]], own_forward(*args, **kwargs)
        if any(True for _ in module.buffers()):
            random.add(key[0])
            return in_eval
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
            before = _rng_state(device)
            module.training = True
            in_training = own_forward(*args, **kwargs)
            module.training = False
            same = torch.equal(before, _rng_state(device)) and equal(in_eval, in_training)
        random.update(() if same else (key[0],))
        return in_eval

    with torch.no_grad(), patched(model, sorted(names), compare):
        model(**batch)
    return random


def _rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module, names: Sequence[str], batch: Batch) -> Trace:
    """The outputs of the named modules in one forward pass."""
    trace: Trace = {}

    def keep(key: CallKey, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = own_forward(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(output)
        trains = any(torch.is_tensor(leaf) and leaf.requires_grad for leaf in leaves)
        trace[key] = _Output(spec, [x.detach().clone() if torch.is_tensor(x) else x for x in leaves], trains)
        return output

    with torch.enable_grad(), patched(model, names, keep):
        model(**batch)
    return trace


def _call(key: CallKey, outputs: Sequence[_Output], shapes: Sequence[tuple[int, int]]) -> Call:
    """A call's output for any batch, from its outputs for batches of `shapes`."""
    first = outputs[0]
    if any(other.spec != first.spec for other in outputs[1:]):
        raise Refused(f"the structure of the output of {key[0]} depends on the batch")
    leaves: list[Any] = []
    for i, leaf in enumerate(first.leaves):
        values = [output.leaves[i] for output in outputs]
        if not torch.is_tensor(leaf):
            if any(isinstance(v, nn.Module) or type(v).__module__.startswith("transformers.cache") for v in values):
                raise Refused(f"{key[0]} returns a {type(leaf).__name__}")
            leaves.append(leaf)
            continue
        if any(v.dim() != leaf.dim() for v in values):
            raise Refused(f"the number of dimensions of the output of {key[0]} depends on the batch")
        sizes = zip(*(v.shape for v in values), strict=True)
        leaves.append(Leaf(tuple(dimension(key, size, shapes) for size in sizes), leaf.dtype))
    return Call(first.spec, tuple(leaves))


def dimension(key: CallKey, sizes: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Dimension:
    """The rule behind the sizes that one dimension has for batches of `shapes`."""
    by_rows, by_length = sizes[1] - sizes[0], (sizes[2] - sizes[0]) if len(sizes) > 2 else 0
    if not by_rows and not by_length:
        return Dimension(constant=sizes[0])
    (rows, length), (_, longest) = shapes[0], shapes[-1]
    if by_rows and not by_length and sizes[0] == by_rows * rows:
        return Dimension(per_example=by_rows)
    if by_length and not by_rows and by_length == longest - length and sizes[0] == length:
        return Dimension(per_position=1)
    raise Refused(f"the size of the output of {key[0]} ({sizes[0]}) is not linear in the batch size or the text length")


# ---- what is recorded ------------------------------------------------------------------------------------------------


def _gradients(
    model: nn.Module, names: Sequence[str], traces: Sequence[Trace], batches: Sequence[Batch]
) -> tuple[list[Gradients], frozenset[str]]:
    """(by batch, the gradients of the model's outputs with respect to the candidates' outputs; inputs that have one).

    The candidates return their traced outputs, detached from what they were computed from.
    """
    by_batch, reads = list[Gradients](), set[str]()
    for trace, batch in zip(traces, batches, strict=True):
        leaves: dict[tuple[CallKey, int], torch.Tensor] = {}

        def hand_on(
            key: CallKey,
            own_forward: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            trace: Trace = trace,
            leaves: dict[tuple[CallKey, int], torch.Tensor] = leaves,
        ) -> Any:
            output = trace[key]
            if output.trains:
                return own_forward(*args, **kwargs)
            values = list(output.leaves)
            for i, value in enumerate(output.leaves):
                if torch.is_tensor(value) and value.is_floating_point():
                    leaves[key, i] = value.clone().requires_grad_()
                    values[i] = leaves[key, i].clone()  # the model may write into it in place
            return pytree.tree_unflatten(values, output.spec)

        floats = {n: v.clone().requires_grad_() for n, v in batch.items() if _is_float(v)}
        with torch.enable_grad(), patched(model, names, hand_on):
            outputs = pytree.tree_leaves(model(**{**batch, **{n: v.clone() for n, v in floats.items()}}))
        targets = [*leaves.values(), *floats.values()]
        arrived = _random_projection_gradient([x for x in outputs if torch.is_tensor(x) and x.requires_grad], targets)
        by_batch.append({k: g for k, g in zip(leaves, arrived, strict=False) if g is not None})
        reads |= {n for n, g in zip(floats, arrived[len(leaves) :], strict=True) if g is not None}
    return by_batch, frozenset(reads)


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _random_projection_gradient(
    outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Gradient of a randomly weighted sum of `outputs` with respect to each of `targets`; None where none arrives."""
    if not outputs:
        raise Refused("the model's output does not depend on anything that trains")
    weights = [torch.rand(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(outputs)]
    total = torch.stack([(x.double() * w.to(x)).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    return torch.autograd.grad(total, targets, allow_unused=True) if targets else ()


def _with_roles(calls: dict[CallKey, Call], gradients: Sequence[Gradients], trace: Trace) -> dict[CallKey, Call]:
    """The calls that stand-ins answer, each output marked as stored, constant or not needed.

    A call whose needed outputs are the same for every example is left out: it is faster computed than stored.
    """
    answered: dict[CallKey, Call] = {}
    for key, call in calls.items():
        needed = {
            i for i, leaf in enumerate(call.leaves) if isinstance(leaf, Leaf) and _is_needed(key, i, leaf, gradients)
        }
        by_example = {i for i in needed if any(d.per_example for d in call.leaves[i].dimensions)}
        if needed and not by_example:
            continue
        leaves = list(call.leaves)
        for i in needed:
            if i in by_example:
                leaves[i] = _stored(key, call.leaves[i], [g.get((key, i)) for g in gradients])
                continue
            if any(d.per_position for d in call.leaves[i].dimensions):
                raise Refused(f"{key[0]} returns a tensor per position next to one per example")
            leaves[i] = Leaf(call.leaves[i].dimensions, call.leaves[i].dtype, constant=trace[key].leaves[i])
        answered[key] = Call(call.spec, tuple(leaves))
    if not any(call.is_stored for call in answered.values()):
        raise Refused("what trains does not depend on what is frozen")
    return answered


def _is_needed(key: CallKey, i: int, leaf: Leaf, gradients: Sequence[Gradients]) -> bool:
    """Whether anything trainable depends on it. Integers, which have no gradient, are taken to be needed."""
    return not leaf.dtype.is_floating_point or any((key, i) in of_batch for of_batch in gradients)


def _stored(key: CallKey, leaf: Leaf, gradients: Sequence[torch.Tensor | None]) -> Leaf:
    """The leaf, marked as stored; `gradients` are those of the output, by traced batch."""
    per_example = [d.per_example for d in leaf.dimensions]
    if sum(bool(n) for n in per_example) > 1:
        raise Refused(f"{key[0]} returns a value for each pair of examples")
    if sum(bool(d.per_position) for d in leaf.dimensions) > 1:
        raise Refused(f"{key[0]} returns a value for each pair of positions of an example")
    # A class token: of (examples, positions, …) only the first position gets a gradient.
    first_only = per_example[0] == 1 and len(leaf.dimensions) > 2
    first_only &= leaf.dimensions[1].constant > 1 or leaf.dimensions[1].per_position == 1
    first_only &= all(g is not None and bool(g[:, 0].any()) and not g[:, 1:].any() for g in gradients)
    return Leaf(leaf.dimensions, leaf.dtype, stored=True, first_only=bool(first_only))
