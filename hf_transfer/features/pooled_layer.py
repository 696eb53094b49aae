"""A model whose head reads the pooled output of any layer, where its configuration does not offer it: see
`models.pooled_head`. What is left out above the layer is found by experiment, and every change is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.errors import UserError, listed, one_line
from hf_transfer.features.batches import Batch, positions_of
from hf_transfer.features.cut import Refused
from hf_transfer.features.layouts import HEAD_INPUT, Layout
from hf_transfer.features.places import Place, Places
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.forward_pass import REFUSALS
from hf_transfer.layers.groups import LayerGroup, layer_groups
from hf_transfer.layers.head_layers import ends_with_linear, in_order, owners, shown
from hf_transfer.layers.side_effects import untouched
from hf_transfer.models.pooled_head import PooledLinear, PoolingSpec, put_pooling

_TOLERANCE = 1e-4  # of the vector that the head reads, relative to the largest element of the layer's output
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")


@dataclass(frozen=True)
class PooledChange:
    """What a head reads instead of what its architecture reads.

    Attributes:
        architecture: class of the model.
        pooling: `cls`, `mean` or `max`.
        layer: name of the layer group that is read, the highest if there are several.
        dropped: names of the layer groups above it, which are left out.
        is_standard: whether plain transformers loads the model, by a switch of its configuration.
        max_error: largest difference, for a few examples, between what the head reads and the pooled output, relative
            to the largest element of that output.
        layers: names of all that are read, from the bottom, where the head averages one on each; else empty.
    """

    architecture: str
    pooling: str
    layer: str
    dropped: tuple[str, ...]
    is_standard: bool
    max_error: float
    layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self) | {"dropped": list(self.dropped), "layers": list(self.layers)}

    def __str__(self) -> str:
        out = f"; the layers above it are left out ({', '.join(self.dropped)})" if self.dropped else ""
        alone = "" if self.is_standard else "; plain transformers cannot load this head, Predictor.load can"
        read = f"{self.pooling} of {self.layer}"
        if self.layers:
            read = f"{self.pooling} of {len(self.layers)} layers, {self.layers[0]} to {self.layer}, one after the other"
        return f"the head reads {read}{out}{alone}"


def read_pooled(
    model: Any,
    groups: Sequence[LayerGroup],
    places: Places,
    batch: Batch,
    layer: str | Sequence[str],
    pooling: str,
    tries: bool = False,
) -> PooledChange:
    """Make the head read a pooled layer, or several, in place; the last linear layer is new.

    Args:
        model: a model of transformers, not wrapped by an adapter.
        groups: its layer groups.
        places: of their outputs.
        batch: a few different examples, on the model's device.
        layer: name of a group below the head, or names of several, from the bottom.
        pooling: `cls`, `mean` or `max`.
        tries: whether to leave the model as it was in the end.

    Raises:
        UserError: this architecture does something else with that layer's output; the model is as it was.
    """
    name, layers = type(model).__name__, (layer,) if isinstance(layer, str) else tuple(layer)
    try:
        spec = _spec(model, groups, places, batch, layers[-1], pooling)
        spec = replace(spec, others=tuple(_source(places, one, pooling) for one in layers[:-1]))
        error = _put(model, groups, places, spec, batch, tries)
    except (Refused, *REFUSALS) as problem:
        raise UserError(
            f"{name} cannot read {pooling} of {listed(layers)}: {one_line(problem)}.".replace("..", "."),
            "Use another layer, or leave pooling out.",
            key="pooling",
        ) from problem
    several = () if isinstance(layer, str) else layers
    return PooledChange(name, pooling, layers[-1], _above(groups, layers[-1]), False, error, several)


def _above(groups: Sequence[LayerGroup], layer: str) -> tuple[str, ...]:
    """Names of the groups between a group and the head."""
    names = [group.name for group in groups]
    return tuple(names[names.index(layer) + 1 : -1])


# ---- what is changed -------------------------------------------------------------------------------------------------


def _spec(
    model: nn.Module, groups: Sequence[LayerGroup], places: Places, batch: Batch, layer: str, pooling: str
) -> PoolingSpec:
    """What `put_pooling` is told.

    Raises:
        Refused: it cannot be done.
    """
    source, place = _source(places, layer, pooling), places.by_group[layer]
    if reason := head_refusal(model, groups):
        raise Refused(reason)
    above = _above(groups, layer)
    dropped = {name for group in groups if group.name in above for name in group.parameters} - place.parameters
    after = {name for group in groups if group.name == layer for name in group.parameters}  # a pooler, say
    calls = _Calls(model, batch, source.path, source.is_input)
    return replace(source, left_out=tuple(calls.left_out(dropped, after)), head=owners(groups[-1].parameters)[0])


def _source(places: Places, layer: str, pooling: str) -> PoolingSpec:
    """Where and how a layer is read; nothing is left out.

    Raises:
        Refused: it cannot be.
    """
    if layer in places.refused or pooling not in places.poolings(layer):
        raise Refused(places.refused.get(layer) or f"it has no {pooling} token")
    place = places.by_group[layer]
    layout = place.layout
    assert isinstance(layout, Layout)
    (path, _), is_input, leaf = place.spot
    return PoolingSpec(
        pooling=pooling,
        layer=layer,
        path=path,
        is_input=is_input,
        leaf=leaf,
        batch=layout.batch,
        channel=layout.channel,
        width=layout.width,
        is_text=layout.is_text,
        skipped=layout.skipped,
        left_out=(),
        head="",
    )


def head_refusal(model: nn.Module, groups: Sequence[LayerGroup]) -> str:
    """Why a head cannot read another layer, whichever, as part of a sentence; empty if it can."""
    heads = owners(in_order(model, groups[-1].parameters))
    is_linear = len(heads) == 1 and ends_with_linear(model, heads)
    return "" if is_linear else f"its head is not one linear layer but {shown(model, heads)}"


class _Calls:
    """Which modules a forward pass calls, how often, when, and whether they return what they take in another form."""

    def __init__(self, model: nn.Module, batch: Batch, path: str, is_input: bool):
        self.model = model
        self.count: dict[str, int] = {}
        self.began: dict[str, int] = {}
        self.form: dict[str, int | None] = {}
        self.time = 0
        handles = []
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(self._begins(name)),
                module.register_forward_hook(self._ends(name), with_kwargs=True),
            ]
        self.ended: dict[str, int] = {}
        try:
            with torch.no_grad():
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        self.start = self.began[path] if is_input else self.ended[path]

    def _begins(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.time += 1
            self.began[name] = self.time
            self.count[name] = self.count.get(name, 0) + 1

        return hook

    def _ends(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.time += 1
            self.ended[name] = self.time
            self.form[name] = _form((args, kwargs), output)

        return hook

    def left_out(self, dropped: set[str], after: set[str]) -> list[tuple[str, int]]:
        """(path, length of the returned tuple) of the largest modules above the layer, with their activations.

        Args:
            dropped: parameters above the layer.
            after: parameters of its own group; those of modules that are called after the output are left out too.

        Raises:
            Refused: a parameter is in no such module.
        """
        found: list[tuple[str, int]] = []

        def visit(path: str, module: nn.Module) -> None:
            names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
            form = self.form.get(path) if self.count.get(path) == 1 else None
            is_later = form is not None and self.began[path] >= self.start
            if names and is_later and path and form is not None and (dropped | after).issuperset(names):
                found.append((path, form))
                return
            if not names and is_later and form is not None and type(module).__module__ in _ACTIVATIONS:
                found.append((path, form))
                return
            own = [n for n, _ in module.named_parameters(recurse=False)]
            if lost := [n for n in own if f"{path}.{n}".lstrip(".") in dropped]:
                raise Refused(f"{path} ({type(module).__name__}) with its {lost[0]} cannot be left out")
            for name, child in module.named_children():
                visit(f"{path}.{name}".lstrip("."), child)

        visit("", self.model)
        return found


def _form(inputs: Any, output: Any) -> int | None:
    """The length of a returned tuple, 0 for a tensor; None if the output cannot stand for the input."""
    taken = [leaf for leaf in pytree.tree_leaves(inputs) if torch.is_tensor(leaf)]
    items = list(output) if type(output) in (tuple, list) else [output]
    first, *rest = items or [None]
    if not taken or not torch.is_tensor(first) or first.dim() != taken[0].dim():
        return None
    if any(x is not None and not torch.is_tensor(x) for x in rest):
        return None
    return len(items) if type(output) in (tuple, list) else 0


# ---- verification ----------------------------------------------------------------------------------------------------


def _put(
    model: Any, groups: Sequence[LayerGroup], places: Places, spec: PoolingSpec, batch: Batch, tries: bool
) -> float:
    """Change the model, and verify it; returns the largest error.

    Raises:
        Refused: the changed model does not read the pooled output. It is as it was.
    """
    seen: list[torch.Tensor] = []
    with untouched(model):
        model.eval()
        outputs = [_at(model, places.by_group[one.layer], batch) for one in spec.parts]
        pooled = [one.pooled(output, positions_of(batch)) for one, output in zip(spec.parts, outputs, strict=True)]
        expected, largest = torch.cat(pooled, 1), max(output.abs().max() for output in outputs)
    undo = put_pooling(model, spec)
    try:
        last = model.get_submodule(spec.head)
        assert isinstance(last, PooledLinear)
        handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with untouched(model), torch.no_grad():
                model.eval()(**batch)
        finally:
            handle.remove()
        read = seen[-1] if seen else expected.new_zeros(0)
        if read.shape[0] != len(expected) or read.shape[-1] != expected.shape[1]:
            raise Refused("its head does not read one vector per example")
        wanted = expected.reshape(len(expected), *[1] * (read.dim() - 2), expected.shape[1])
        error = float((read - wanted).abs().max() / largest.clamp(min=1e-30))
        if not error <= _TOLERANCE:
            raise Refused(f"what follows that layer changes it (by {error:.2g})")
        _check_groups(model, groups, spec)
    except BaseException:
        undo()
        raise
    if tries:
        undo()
    return error


@torch.no_grad()
def _at(model: nn.Module, place: Place, batch: Batch) -> torch.Tensor:
    """The tensor at a place for a batch.

    Raises:
        Refused: its module is called several times.
    """
    seen: list[torch.Tensor] = []
    (path, _), is_input, leaf = place.spot
    module = model.get_submodule(path)
    if is_input:
        handle: Any = module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(pytree.tree_leaves((args, kwargs))[leaf]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda _, args, out: seen.append(pytree.tree_leaves(out)[leaf]))
    try:
        model(**batch)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise Refused(f"{path} is called {len(seen)} times")
    return seen[0]


def _check_groups(model: nn.Module, groups: Sequence[LayerGroup], spec: PoolingSpec) -> None:
    """Check that the layer groups up to the layer are still those of the model.

    Raises:
        Refused: they are not.
    """
    left = {name for name, _ in model.named_parameters()}
    rules = [("^" + name.replace(".", r"\.") + "$", HEAD) for name in groups[-1].parameters if name in left]
    try:
        now = layer_groups(model, rules)
    except UserError as error:
        raise Refused(error.problem) from error
    before = [set(group.parameters) & left for group in groups]
    own = [names for names in before[:-1] if names]
    if [set(group.parameters) for group in now[:-1]] != own:
        raise Refused(f"its layers below {spec.layer} could not be told apart any more")


def reads(model: nn.Module, places: Places, batch: Batch, layer: str, pooling: str) -> bool:
    """Whether the head reads a pooled layer as the model is made, bit for bit but for rounding."""
    own, place = places.by_group.get(HEAD), places.by_group.get(layer)
    if own is None or place is None or pooling not in places.poolings(layer):
        return False
    mask = positions_of(batch)
    with untouched(model):
        model.eval()
        found = {
            (HEAD, HEAD_INPUT): next(iter(own.layout.pooled(_at(model, own, batch), (HEAD_INPUT,), mask).values())),
            (layer, pooling): place.layout.pooled(_at(model, place, batch), (pooling,), mask)[pooling],
        }
    one, other = found.values()
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
