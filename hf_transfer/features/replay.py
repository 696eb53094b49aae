"""What the frozen bottom of any model computes, recorded once and handed back by stand-ins.

No line of this knows an architecture. The modules in which nothing trains, inside layer groups below everything that
does, are *candidates*. Their calls are traced; which of the outputs the rest of the model depends on is decided by
autograd (a gradient reaches them or not); those are recorded. In a replay the candidates' `forward` is replaced: what
is needed comes from the record, what is not is an empty tensor of the right shape, and everything else, masks, pooling,
the head, runs as written.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.layers.groups import LayerGroup

Batch = dict[str, Any]
Key = tuple[str, int]  # a module's name, and which of its calls in a forward pass
_ROWS = (2, 3)  # examples in the batches that are traced
_LENGTHS = (7, 11)


class Refused(Exception):
    """The frozen part cannot be replayed; why, as part of a sentence."""


@dataclass(frozen=True)
class Dimension:
    """The size of a dimension: a constant, or so many per example, or per position of the text."""

    constant: int = 0
    per_example: int = 0
    per_position: int = 0

    def size(self, rows: int, length: int) -> int:
        return self.constant + self.per_example * rows + self.per_position * length


@dataclass(frozen=True)
class Leaf:
    """One tensor among the outputs of a call.

    Attributes:
        dimensions: its shape for any batch.
        dtype: as computed.
        stored: whether it must be recorded; else nothing that trains depends on it.
        first_only: of the dimension behind the examples', only the first position matters (a class token).
        constant: its value, where it is the same for every batch.
    """

    dimensions: tuple[Dimension, ...]
    dtype: torch.dtype
    stored: bool = False
    first_only: bool = False
    constant: torch.Tensor | None = None

    @property
    def _batch(self) -> int:
        return next(i for i, d in enumerate(self.dimensions) if d.per_example)

    @property
    def _length(self) -> int | None:
        return next((i for i, d in enumerate(self.dimensions) if d.per_position), None)

    @property
    def ragged(self) -> bool:
        """Whether an example has a row for each position of its text."""
        return self._length is not None and not self.first_only

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example, without the positions where it is ragged."""
        rest = [d.constant for i, d in enumerate(self.dimensions) if i not in (self._batch, self._length)]
        several = self.dimensions[self._batch].per_example
        shape = ([several] if several > 1 else []) + rest
        return tuple(shape[1:] if self.first_only and self._length is None else shape)

    @property
    def nbytes(self) -> int:
        """Of one example, or of one position of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """(examples, [positions,] *shape) of what the call gave."""
        several, order = self.dimensions[self._batch].per_example, [self._batch]
        order += [] if self._length is None else [self._length]
        value = value.permute(*order, *(i for i in range(value.dim()) if i not in order))
        if several > 1:
            value = value.reshape(-1, several, *value.shape[1:])
            value = value.transpose(1, 2) if self._length is not None else value
        return value[:, 0] if self.first_only else value

    def output(self, rows: torch.Tensor, count: int, length: int) -> torch.Tensor:
        """What the call gave, from `rows` as above."""
        if self.first_only:
            behind = length if self._length is not None else self.dimensions[1].constant
            whole = rows.new_zeros((count, behind, *rows.shape[1:]))
            whole[:, 0] = rows
            rows = whole
        several, order = self.dimensions[self._batch].per_example, [self._batch]
        order += [] if self._length is None else [self._length]
        if several > 1:
            rows = rows.transpose(1, 2) if self._length is not None else rows
            rows = rows.reshape(-1, *rows.shape[2:])
        order += [i for i in range(len(self.dimensions)) if i not in order]
        return rows.permute(*(order.index(i) for i in range(len(order))))

    def nothing(self, count: int, length: int, device: torch.device, real: bool) -> torch.Tensor:
        """Of the right shape, for what nobody depends on; `real` where something writes into it."""
        shape = [d.size(count, length) for d in self.dimensions]
        if real:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        return torch.zeros((), dtype=self.dtype, device=device).expand(shape)


@dataclass(frozen=True)
class Call:
    """What one call of a candidate gives: `leaves`, tensors (`Leaf`) and other values, in the form `spec`."""

    spec: Any
    leaves: tuple[Any, ...]

    @property
    def is_stored(self) -> bool:
        return any(isinstance(leaf, Leaf) and leaf.stored for leaf in self.leaves)


@dataclass(frozen=True)
class Cut:
    """Where a model is entered in a replay.

    Attributes:
        calls: every call that a stand-in answers.
        reads: names of the floating-point inputs that what trains depends on by itself.
        real: whether what nobody depends on must be real memory.
    """

    calls: Mapping[Key, Call]
    reads: frozenset[str]
    real: bool = False

    @property
    def stored(self) -> dict[str, tuple[Key, int, Leaf]]:
        """{name of what is recorded: (call, which of its outputs, its form)}"""
        return {
            f"{name}#{index}/{i}": ((name, index), i, leaf)
            for (name, index), call in self.calls.items()
            for i, leaf in enumerate(call.leaves)
            if isinstance(leaf, Leaf) and leaf.stored
        }

    def nbytes(self, length: int) -> int:
        """Of one example, of so many positions."""
        return sum(leaf.nbytes * (length if leaf.ragged else 1) for _, _, leaf in self.stored.values())

    @property
    def where(self) -> str:
        """The modules whose outputs are recorded, for a person."""
        return ", ".join(dict.fromkeys(key[0] for key, _, _ in self.stored.values()))


# ---- inputs --------------------------------------------------------------------------------------------------------


def length_of(batch: Mapping[str, Any]) -> int:
    """Positions of the texts in a batch, padding among them; 0 where there are no texts."""
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        if torch.is_tensor(batch.get(name)) and batch[name].dim() >= 2:
            return int(batch[name].shape[1])
    return 0


def count_of(batch: Mapping[str, Any]) -> int:
    """Examples in a batch."""
    return next(len(value) for value in batch.values() if torch.is_tensor(value) and value.dim())


def positions_of(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(examples, positions): which hold text; None where all do, or there are no texts."""
    mask = batch.get("attention_mask")
    return mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None


def _resized(batch: Batch, rows: int, length: int) -> Batch:
    """The batch with another number of examples and positions, the last example padded where the batch says so."""
    own, found = length_of(batch), {}
    pick = torch.arange(rows) % count_of(batch)
    columns = torch.arange(length) % own if own else None
    for name, value in batch.items():
        if torch.is_tensor(value) and value.dim():
            value = value[pick.to(value.device)]
            if columns is not None and value.dim() >= 2 and value.shape[1] == own:
                value = value[:, columns.to(value.device)]
        found[name] = value
    mask = found.get("attention_mask")
    if columns is not None and torch.is_tensor(mask) and mask.dim() == 2:
        left = bool((batch["attention_mask"][:, 0] == 0).any())
        mask = torch.ones_like(mask)
        mask[-1, slice(0, 2) if left else slice(length - 2, length)] = 0
        found["attention_mask"] = mask
    return found


# ---- stand-ins -----------------------------------------------------------------------------------------------------

Handler = Callable[[Key, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def patched(model: nn.Module, names: Sequence[str], handler: Handler) -> Iterator[None]:
    """Calls of the named modules go to `handler(key, their own forward, arguments, keywords)`.

    The instances' `forward` is replaced: hooks, attributes and names stay.
    """
    counts: Counter[str] = Counter()
    modules = {name: model.get_submodule(name) for name in names}

    def stand_in(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (name, counts[name])
            counts[name] += 1
            return handler(key, own, args, kwargs)

        return forward

    before = {name: vars(modules[name]).get("forward") for name in names}
    hook = model.register_forward_pre_hook(lambda *_: counts.clear(), prepend=True)
    try:
        for name in names:
            modules[name].forward = stand_in(name, modules[name].forward)
        yield
    finally:
        hook.remove()
        for name, own in before.items():
            if own is None:
                modules[name].__dict__.pop("forward", None)
            else:
                modules[name].forward = own


# ---- where to cut --------------------------------------------------------------------------------------------------


def boundary(model: nn.Module, groups: Sequence[LayerGroup]) -> int:
    """Index of the first group in which anything trains, by what requires a gradient now."""
    parameters = dict(model.named_parameters())
    for i, group in enumerate(groups):
        if any(parameters[name].requires_grad for name in group.parameters):
            return i
    return len(groups)


def find_cut(model: nn.Module, groups: Sequence[LayerGroup], batch: Batch) -> Cut:
    """Where `model` can be entered, with what requires a gradient now.

    Args:
        model: is left in eval mode; nothing else of it changes.
        groups: its layer groups.
        batch: of examples, as the model reads them, on its device.

    Raises:
        Refused: there is no such place.
    """
    index = boundary(model, groups)
    if index == 0:
        raise Refused(f"{groups[0].name}, where the input enters, trains")
    if index == len(groups):
        raise Refused("nothing trains")
    batch = {name: value for name, value in batch.items() if name != "labels"}
    names, doubtful = _candidates(model, groups[:index], groups)
    length = length_of(batch)
    shapes = [(_ROWS[0], _LENGTHS[0]), (_ROWS[1], _LENGTHS[0]), *([(_ROWS[0], _LENGTHS[1])] if length else [])]
    batches = [_resized(batch, rows, positions) for rows, positions in shapes]
    model.eval()
    random = _random(model, doubtful, batches[0])
    names = [name for name in names if name not in random]
    best = _cut(model, names, batches, shapes)
    modules = dict(model.named_modules())
    for name in {key[0] for key, _, _ in best.stored.values()}:
        if not any(True for _ in modules[name].parameters()):  # a pooling takes less room; others add nothing
            other = _cut(model, [n for n in names if n != name], batches, shapes)
            if other.nbytes(length) <= best.nbytes(length):
                best, names = other, [n for n in names if n != name]
    return best


def _cut(model: nn.Module, names: Sequence[str], batches: Sequence[Batch], shapes: Sequence[tuple[int, int]]) -> Cut:
    """The cut that has stand-ins for the named modules only."""
    traces = [_trace(model, names, one) for one in batches]
    kept = [key for key, (_, _, moves) in traces[0].items() if not moves]
    for trace in traces[1:]:
        if [key for key, (_, _, moves) in trace.items() if not moves] != kept:
            raise Refused("which of the frozen modules are called depends on the batch")
    calls = {key: _form(key, [trace[key] for trace in traces], shapes) for key in kept}
    grads, reads = _gradients(model, names, traces, batches)
    return Cut(_judged(calls, grads, traces[0]), reads)


def _candidates(
    model: nn.Module, below: Sequence[LayerGroup], groups: Sequence[LayerGroup]
) -> tuple[list[str], set[str]]:
    """(names of the largest modules inside the groups below, and of the parameterless ones beside them; those of the
    latter that are in train mode while the model trains, so that they may be random)."""
    parameters = dict(model.named_parameters())
    inside = {id(parameters[name]) for group in below for name in group.parameters}
    still = {id(module) for module in frozen_modules(model, groups)}
    found, doubtful = list[str](), set[str]()

    def visit(name: str, module: nn.Module) -> None:
        own = list(module.parameters())
        is_called = type(module).forward is not nn.Module.forward  # else a list of others
        if own and is_called and all(id(p) in inside for p in own):
            found.append(name)
        elif not own and not any(True for _ in module.children()):
            found.append(name)
            if id(module) not in still:
                doubtful.add(name)
        else:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}".lstrip("."), child)

    visit("", model)
    return found, doubtful


def _random(model: nn.Module, names: set[str], batch: Batch) -> set[str]:
    """Those of the parameterless modules that compute something else in train mode, or keep count of what they saw."""
    modules, found = dict(model.named_modules()), set[str]()
    device = next(model.parameters()).device

    def compare(key: Key, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, plain = modules[key[0]], own(*args, **kwargs)
        if any(True for _ in module.buffers()):
            found.add(key[0])
            return plain
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
            before = _state(device)
            module.training = True
            live = own(*args, **kwargs)
            module.training = False
            same = torch.equal(before, _state(device)) and equal(plain, live)
        found.update(() if same else (key[0],))
        return plain

    with torch.no_grad(), patched(model, sorted(names), compare):
        model(**batch)
    return found


def _state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def equal(one: Any, other: Any) -> bool:
    """Whether two batches, outputs or lists of tensors are the same by every bit."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a is b or a == b for a, b in pairs)


Traced = tuple[Any, list[Any], bool]  # (form of the output, its leaves, whether what trains had a part in it)


def _trace(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[Key, Traced]:
    found: dict[Key, Traced] = {}

    def note(key: Key, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = own(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(output)
        moves = any(torch.is_tensor(leaf) and leaf.requires_grad for leaf in leaves)
        found[key] = (spec, [x.detach().clone() if torch.is_tensor(x) else x for x in leaves], moves)
        return output

    with torch.enable_grad(), patched(model, names, note):
        model(**batch)
    return found


def _form(key: Key, seen: Sequence[Traced], shapes: Sequence[tuple[int, int]]) -> Call:
    """The outputs of a call, for any batch, from those for batches of `shapes`."""
    spec, first, _ = seen[0]
    if any(other != spec for other, _, _ in seen[1:]):
        raise Refused(f"the form of what {key[0]} gives depends on the batch")
    leaves: list[Any] = []
    for i, leaf in enumerate(first):
        values = [trace[1][i] for trace in seen]
        if not torch.is_tensor(leaf):
            if any(isinstance(v, nn.Module) or type(v).__module__.startswith("transformers.cache") for v in values):
                raise Refused(f"{key[0]} hands on a {type(leaf).__name__}")
            leaves.append(leaf)
            continue
        if any(v.dim() != leaf.dim() for v in values):
            raise Refused(f"the number of dimensions of what {key[0]} gives depends on the batch")
        sizes = zip(*(v.shape for v in values), strict=True)
        leaves.append(Leaf(tuple(_dimension(key, size, shapes) for size in sizes), leaf.dtype))
    return Call(spec, tuple(leaves))


def _dimension(key: Key, sizes: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Dimension:
    more, longer = sizes[1] - sizes[0], (sizes[2] - sizes[0]) if len(sizes) > 2 else 0
    if not more and not longer:
        return Dimension(constant=sizes[0])
    (rows, length), (_, longest) = shapes[0], shapes[-1]
    if more and not longer and sizes[0] == more * rows:
        return Dimension(per_example=more)
    if longer and not more and longer == longest - length and sizes[0] == length:
        return Dimension(per_position=1)
    raise Refused(
        f"the size of what {key[0]} gives ({sizes[0]}) follows from the batch in a way that is not understood"
    )


def _gradients(
    model: nn.Module, names: Sequence[str], traces: Sequence[dict[Key, Traced]], batches: Sequence[Batch]
) -> tuple[list[dict[tuple[Key, int], torch.Tensor]], frozenset[str]]:
    """(for each batch, {(call, output): gradient of what the model gives, where one arrives}; inputs that have one).

    Every candidate hands on its traced outputs, cut off from what they were computed from.
    """
    found, reads = [], set[str]()
    for trace, batch in zip(traces, batches, strict=True):
        leaves: dict[tuple[Key, int], torch.Tensor] = {}

        def hand_on(
            key: Key,
            own: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            trace: dict[Key, Traced] = trace,
            leaves: dict[tuple[Key, int], torch.Tensor] = leaves,
        ) -> Any:
            spec, values, moves = trace[key]
            if moves:
                return own(*args, **kwargs)
            handed = list(values)
            for i, value in enumerate(values):
                if torch.is_tensor(value) and value.is_floating_point():
                    leaves[key, i] = value.clone().requires_grad_()
                    handed[i] = leaves[key, i].clone()  # something may write into it
            return pytree.tree_unflatten(handed, spec)

        own = {n: v.clone().requires_grad_() for n, v in batch.items() if torch.is_tensor(v) and v.is_floating_point()}
        with torch.enable_grad(), patched(model, names, hand_on):
            outputs = pytree.tree_leaves(model(**{**batch, **{n: v.clone() for n, v in own.items()}}))
        outputs = [x for x in outputs if torch.is_tensor(x) and x.requires_grad]
        if not outputs:
            raise Refused("what the model gives does not depend on anything that trains")
        weights = [torch.rand(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(outputs)]
        total = sum((x.double() * w.to(x)).sum() for x, w in zip(outputs, weights, strict=True))
        wanted = [*leaves.values(), *own.values()]
        arrived = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
        found.append({k: g for k, g in zip(leaves, arrived, strict=False) if g is not None})
        reads |= {n for n, g in zip(own, arrived[len(leaves) :], strict=True) if g is not None}
    return found, frozenset(reads)


def _judged(
    calls: dict[Key, Call], grads: Sequence[dict[tuple[Key, int], torch.Tensor]], traced: dict[Key, Traced]
) -> dict[Key, Call]:
    """Which outputs are stored, which stay as they are, and without the calls that are made in a replay too."""
    judged: dict[Key, Call] = {}
    for key, call in calls.items():
        live = {i for i, leaf in enumerate(call.leaves) if isinstance(leaf, Leaf) and _is_live(key, i, leaf, grads)}
        by_example = {i for i in live if any(d.per_example for d in call.leaves[i].dimensions)}
        if live and not by_example:
            continue  # the same for every example: quicker computed than kept
        leaves = list(call.leaves)
        for i in live:
            leaves[i] = _stored(key, call.leaves[i], [g.get((key, i)) for g in grads]) if i in by_example else None
            if leaves[i] is None:
                if any(d.per_position for d in call.leaves[i].dimensions):
                    raise Refused(
                        f"{key[0]} gives something for each pair of positions beside what it gives by example"
                    )
                form = call.leaves[i]
                leaves[i] = Leaf(form.dimensions, form.dtype, constant=traced[key][1][i])
        judged[key] = Call(call.spec, tuple(leaves))
    if not any(call.is_stored for call in judged.values()):
        raise Refused("what trains does not depend on what is frozen")
    return judged


def _is_live(key: Key, i: int, leaf: Leaf, grads: Sequence[Mapping[tuple[Key, int], torch.Tensor]]) -> bool:
    """Whether what trains depends on it; of whole numbers, which have no gradient, it is supposed."""
    return not leaf.dtype.is_floating_point or any((key, i) in found for found in grads)


def _stored(key: Key, leaf: Leaf, grads: Sequence[torch.Tensor | None]) -> Leaf:
    per_example = [d.per_example for d in leaf.dimensions]
    if sum(bool(n) for n in per_example) > 1:
        raise Refused(f"{key[0]} gives something for each pair of examples")
    if sum(bool(d.per_position) for d in leaf.dimensions) > 1:
        raise Refused(f"{key[0]} gives something for each pair of positions of an example")
    # A class token: of (examples, positions, …) nothing but the first position gets a gradient.
    first = per_example[0] == 1 and len(leaf.dimensions) > 2
    first &= leaf.dimensions[1].constant > 1 or leaf.dimensions[1].per_position == 1
    first &= all(g is not None and bool(g[:, 0].any()) and not g[:, 1:].any() for g in grads)
    return Leaf(leaf.dimensions, leaf.dtype, stored=True, first_only=bool(first))


# ---- recording and replaying ---------------------------------------------------------------------------------------


class _Seen(BaseException):
    """Everything that was wanted has been computed: the rest of the forward pass is not needed."""


def record(model: nn.Module, cuts: Sequence[Cut], batch: Batch) -> list[dict[str, torch.Tensor]]:
    """What crosses the boundary for each cut, {name: (examples, [positions,] *shape)}; one forward pass, to the last.

    The model must be in eval mode. Where a cut is deeper than another, the deeper modules are called as part of the
    other's.
    """
    wanted: dict[Key, list[tuple[int, str, int, Leaf]]] = {}
    for n, cut in enumerate(cuts):
        for name, (key, i, leaf) in cut.stored.items():
            wanted.setdefault(key, []).append((n, name, i, leaf))
    found: list[dict[str, torch.Tensor]] = [{} for _ in cuts]
    left = set(wanted)

    def note(key: Key, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = own(*args, **kwargs)
        if key in left:
            leaves = pytree.tree_leaves(output)
            for n, name, i, leaf in wanted[key]:
                found[n][name] = leaf.rows(leaves[i].detach()).clone()
            left.discard(key)
            if not left:
                raise _Seen
        return output

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    names = list(dict.fromkeys(name for name, _ in wanted))
    with torch.no_grad(), patched(model, names, note), contextlib.suppress(_Seen):
        model(**inputs)
    if left:
        raise Refused(f"{next(iter(left))[0]} was not called for a batch")
    return found


@contextlib.contextmanager
def replaying(
    model: nn.Module, cut: Cut, rows: Mapping[str, torch.Tensor], count: int, length: int, device: torch.device
) -> Iterator[None]:
    """In here the frozen part of `model` gives `rows`, which `record` had: {name: (examples, [positions,] *shape)}."""
    outputs: dict[Key, list[Any]] = {}
    for key, call in cut.calls.items():
        leaves = []
        for i, leaf in enumerate(call.leaves):
            if not isinstance(leaf, Leaf):
                leaves.append(leaf)
            elif leaf.stored:
                leaves.append(leaf.output(rows[f"{key[0]}#{key[1]}/{i}"], count, length))
            elif leaf.constant is not None:
                leaves.append(leaf.constant)
            else:
                leaves.append(leaf.nothing(count, length, device, cut.real))
        outputs[key] = leaves

    def answer(key: Key, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if key not in outputs:
            return own(*args, **kwargs)
        return pytree.tree_unflatten(outputs[key], cut.calls[key].spec)

    with patched(model, list(dict.fromkeys(name for name, _ in cut.calls)), answer):
        yield
