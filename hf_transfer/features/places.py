"""Where in a forward pass the output of each layer group is, found by experiment, without a line per architecture.

The output of a layer group is the last tensor with positions (tokens, patches or pixels) that its modules return; or,
where the model computes on with it before the next group begins (the sum of token and position embeddings), what the
next group takes. Which axis is what is seen from batches of several sizes, also for images of another size. A model
that takes images of one size only is asked which axis its layers read as channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_transfer.errors import one_line
from hf_transfer.features import tokens
from hf_transfer.features.batches import Batch, length_of, resized
from hf_transfer.features.calls import (
    Pass,
    Spot,
    Tensor,
    all_require_gradients,
    ancestors,
    outermost_called,
    parameters_in,
    watch,
)
from hf_transfer.features.cut import Dimension, Refused
from hf_transfer.features.layouts import HEAD_INPUT, MAX, MEAN, POOLINGS, HeadInput, Layout, sides
from hf_transfer.features.tokens import Rows
from hf_transfer.features.trace import dimension
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.forward_pass import REFUSALS
from hf_transfer.layers.groups import LayerGroup

_ROWS, _LENGTHS = (2, 3), (7, 11)  # examples and token positions of the batches tried
_SIZES = (0.5, 2.0)  # of images, relative to the given ones; the first that the model takes is used


@dataclass(frozen=True)
class Place:
    """Where the output of a layer group, or the input of the head, is.

    Attributes:
        spot: which call of which module.
        layout: its axes.
        parameters: names of all parameters that it depends on.
    """

    spot: Spot
    layout: Layout | HeadInput
    parameters: frozenset[str]


@dataclass(frozen=True)
class Places:
    """Where the outputs of a model's layer groups are.

    Attributes:
        by_group: in the order of the groups.
        refused: {group: why its output cannot be pooled, as part of a sentence}.
        has_class_token: whether the first position of an example stands for the whole.
    """

    by_group: dict[str, Place]
    refused: dict[str, str]
    has_class_token: bool

    def poolings(self, group: str) -> tuple[str, ...]:
        """How the output of a layer group can be pooled."""
        layout = self.by_group[group].layout
        if isinstance(layout, HeadInput):
            return (HEAD_INPUT,)
        return POOLINGS if self.has_class_token and (layout.is_text or 0 in layout.skipped) else (MEAN, MAX)

    def channels(self, group: str) -> int:
        """The number of channels of a layer group whose positions are pixels; 0 for tokens and patches."""
        layout = self.by_group[group].layout
        is_pixels = isinstance(layout, Layout) and not layout.is_text and not self.has_class_token
        return layout.width if is_pixels else 0


def find_places(model: nn.Module, groups: Sequence[LayerGroup], batch: Batch) -> Places:
    """Find the outputs of layer groups.

    Args:
        model: in eval mode.
        groups: its layer groups, with or without a head.
        batch: several different examples, on the model's device.

    Raises:
        Refused: the model computes different things for batches of different sizes.
    """
    with all_require_gradients(model):
        return _Search(model, groups, batch).places()


class _Search:
    def __init__(self, model: nn.Module, groups: Sequence[LayerGroup], batch: Batch):
        self.model, self.groups, self.batch = model, groups, batch
        self.head = len(groups) - 1 if groups[-1].name == HEAD else None
        length = length_of(batch)
        shapes = [(_ROWS[0], _LENGTHS[0]), (_ROWS[1], _LENGTHS[0]), *([(_ROWS[0], _LENGTHS[1])] if length else [])]
        batches = [_with_noise(resized(batch, *shape)) for shape in shapes]
        with _explained(batches[0]):
            group_of = outermost_called(model, groups, batches[0])
            self.first = watch(model, group_of, batches[0], gradients=True)
        passes = [self.first]
        for one in batches[1:]:
            with _explained(one):
                passes.append(watch(model, group_of, one))
        self.shapes, self.is_text = shapes, bool(length)
        self.dimensions = self._dimensions([_by_spot(one) for one in passes])
        self.image = _image_size(batches[0])
        self.resized = {} if length else self._other_size(group_of, batches[0])
        self.names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}

    def _dimensions(self, passes: Sequence[dict[Spot, Tensor]]) -> dict[Spot, tuple[Dimension, ...]]:
        """How the sizes of each tensor follow from those of the batch; without tensors where they do not."""
        rules = {}
        for spot, tensor in passes[0].items():
            values = [one[spot].value for one in passes if spot in one]
            if len(values) < len(passes) or any(v.dim() != tensor.value.dim() for v in values):
                continue
            try:
                sizes = zip(*(v.shape for v in values), strict=True)
                rules[spot] = tuple(dimension(spot[0], size, self.shapes) for size in sizes)
            except Refused:
                continue
        return rules

    def _other_size(self, group_of: dict[str, int], batch: Batch) -> dict[Spot, torch.Size]:
        """{spot: shape} for images of another size; empty if the model takes only images of the given size."""
        images = {n: v for n, v in batch.items() if torch.is_tensor(v) and v.dim() == 4 and v.is_floating_point()}
        for scale in _SIZES if images else ():
            smaller = {n: functional.interpolate(v, scale_factor=scale) for n, v in images.items()}
            try:
                seen = _by_spot(watch(self.model, group_of, {**batch, **smaller}))
            except (*REFUSALS, AssertionError):
                continue
            return {spot: tensor.value.shape for spot, tensor in seen.items()}
        return {}

    # ---- which tensor ----

    def places(self) -> Places:
        backbone = [i for i in range(len(self.groups)) if i != self.head]
        chosen = {i: self._outputs(i) for i in backbone}
        skipped, has_class_token = self._tokens([tensors[0] for tensors in chosen.values() if tensors])
        by_group: dict[str, Place] = {}
        refused: dict[str, str] = {}
        for i in backbone:
            reasons = ["none of its modules returns a tensor with one vector per position"]
            for tensor in chosen[i]:
                try:
                    layout = self._skipping(self._layout(tensor), tensor, skipped)
                except Refused as error:
                    reasons.append(str(error))
                    continue
                by_group[self.groups[i].name] = Place(tensor.spot, layout, self._depends(i, tensor))
                break
            else:
                refused[self.groups[i].name] = reasons[min(1, len(reasons) - 1)]
        if self.head is not None:
            try:
                by_group[HEAD] = self._head_input(self.head)
            except Refused as error:
                refused[HEAD] = str(error)
        return Places(by_group, refused, has_class_token)

    def _outputs(self, i: int) -> list[Tensor]:
        """What may be the output of a layer group, the most likely first; empty if no tensor has positions."""
        own = [t for call in self.first.returned for t in _first(call, self._has_positions) if t.group == i]
        following = [t for call in self.first.taken for t in _first(call, self._has_positions) if t.group == i + 1]
        if following:
            taken = following[0]
            own = [t for t in own if t.time < taken.time] or own  # a decoder, say, uses the embeddings again
            if not own or (taken.value is not own[-1].value and own[-1].origin in ancestors(taken.origin)):
                own.append(taken)
        # What only the class token or the pooled features pass through (a norm) is less than the output of a block.
        own.reverse()
        return sorted(own, key=lambda t: not self.is_text and sum(size > 1 for size in t.value.shape[1:]) < 2)

    def _has_positions(self, tensor: Tensor) -> bool:
        sizes = self.dimensions.get(tensor.spot)
        if sizes is None or len(sizes) < 3 or [d.per_example for d in sizes if d.per_example] != [1]:
            return False
        lengths = sum(bool(d.per_position) for d in sizes)
        return (lengths == 1 and len(sizes) == 3) if self.is_text else lengths == 0

    def _depends(self, i: int, tensor: Tensor) -> frozenset[str]:
        """The parameters of the groups up to this one, and any others that the tensor was computed from."""
        if tensor.origin is None:
            return frozenset(self.names.values())
        reached = {self.names[p] for p in parameters_in(ancestors(tensor.origin)) if p in self.names}
        other = {n for n, p in self.model.named_parameters() if not p.is_floating_point()}
        return frozenset(reached | other | {name for group in self.groups[: i + 1] for name in group.parameters})

    # ---- which axis ----

    def _layout(self, tensor: Tensor) -> Layout:
        sizes = self.dimensions[tensor.spot]
        batch = next(axis for axis, d in enumerate(sizes) if d.per_example)
        others = [axis for axis, d in enumerate(sizes) if not d.per_example and not d.per_position]
        channel = others[0] if len(others) == 1 else self._channel(tensor, others)
        return Layout(batch, channel, tensor.value.shape[channel], self.is_text)

    def _channel(self, tensor: Tensor, axes: Sequence[int]) -> int:
        """Which of the axes of an image model's output holds the channels.

        Raises:
            Refused: that cannot be told.
        """
        shape, other = tensor.value.shape, self.resized.get(tensor.spot)
        if other is not None and len(other) == len(shape):
            same = [axis for axis in axes if shape[axis] == other[axis]]
            if len(same) == 1:
                return same[0]
        large = [axis for axis in axes if shape[axis] > 1]
        if len(large) == 1:
            return large[0]
        for matches in (lambda x: x is tensor.value, lambda x: x.shape == shape):
            votes = {axis for x, axis in self.first.consumers if matches(x)}
            if len(votes) == 1 and votes <= set(axes):
                return votes.pop()
        raise Refused(f"nothing shows which axis of its output of shape {tuple(shape)} holds the channels")

    # ---- positions that are no patches, class tokens ----

    def _tokens(self, outputs: Sequence[Tensor]) -> tuple[tuple[int, ...], bool]:
        """(positions of an image model's tokens that are no patches, whether the first position is a class token)."""
        if not outputs or (not self.is_text and outputs[0].value.dim() != 3):
            return (), False
        try:
            first, last = (Rows(tensor.value, self._layout(tensor)) for tensor in (outputs[0], outputs[-1]))
        except Refused:
            return (), False
        if not self.is_text:
            return tokens.of_images(self.model, first)
        return (), tokens.has_class_token(self.batch, self.first.output, first, last)

    def _skipping(self, layout: Layout, tensor: Tensor, skipped: tuple[int, ...]) -> Layout:
        """The layout, with the positions that are no patches.

        Raises:
            Refused: some of its positions are no patches, and nothing shows which.
        """
        if self.is_text or tensor.value.dim() != 3:
            return layout
        positions = tensor.value.numel() // tensor.value.shape[layout.batch] // layout.width
        if self.image and not sides(positions - len(skipped), *self.image):
            raise Refused(f"its {positions} positions are not {len(skipped)} tokens and a grid of patches of the image")
        return layout.without(skipped)

    # ---- the head ----

    def _head_input(self, i: int) -> Place:
        calls = [
            [t for t in call if self._has_examples(t)][:1] for call in self.first.taken if call and call[0].group == i
        ]
        calls = [call for call in calls if call]
        if not calls:
            raise Refused("none of its modules takes a tensor with one row per example")
        tensor = calls[0][0]
        for (other,) in calls[1:]:
            if other.value is not tensor.value and (tensor.origin not in ancestors(other.origin)):
                raise Refused("it reads several tensors")
        token = ""
        if self._has_positions(tensor) and tensor.value.shape[1:].numel() != max(tensor.value.shape[1:]):
            rows = Rows(tensor.value, self._layout(tensor))
            token = tokens.read_by_model(self.first.output, rows) if self.is_text else ""
            if not token:
                raise Refused("it reads all positions of an example, not one vector")
        width = tensor.value.shape[-1] if token else tensor.value[0].numel()
        return Place(tensor.spot, HeadInput(width, token), self._depends(i - 1, tensor))

    def _has_examples(self, tensor: Tensor) -> bool:
        sizes = self.dimensions.get(tensor.spot, ())
        return len(sizes) > 1 and sizes[0].per_example == 1


@contextlib.contextmanager
def _explained(batch: Batch) -> Iterator[None]:
    """Turns errors of the model for a batch into `Refused`."""
    try:
        yield
    except REFUSALS as error:
        shapes = {name: tuple(value.shape) for name, value in batch.items() if torch.is_tensor(value)}
        raise Refused(f"the model cannot process a batch of {shapes} ({one_line(error, 150)})") from error


def _first(call: Sequence[Tensor], condition: Any) -> list[Tensor]:
    """The first tensor of a call, if any, that fulfills the condition."""
    return [tensor for tensor in call if condition(tensor)][:1]


def _by_spot(one: Pass) -> dict[Spot, Tensor]:
    return {tensor.spot: tensor for call in (*one.taken, *one.returned) for tensor in call}


def _with_noise(batch: Batch) -> Batch:
    """The batch with images that differ everywhere, without labels."""
    noisy = {}
    for name, value in batch.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.dim() == 4:
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
            value = value + noise.to(value)
        noisy[name] = value
    return {name: value for name, value in noisy.items() if name != "labels"}


def _image_size(batch: Batch) -> tuple[int, int] | None:
    return next(
        ((int(v.shape[-2]), int(v.shape[-1])) for v in batch.values() if torch.is_tensor(v) and v.dim() == 4), None
    )
