"""Which positions of an input an answer rests on, by gradients, computed by captum (extra `explain`).

The model is entered at the output of a layer group, which `features.places` finds for any architecture:

- tokens (texts, and images in patches): integrated gradients (Sundararajan et al. 2017, "Axiomatic Attribution for Deep
  Networks", section 3) from the first layer group's output for a blank input to that for the input itself. What the
  positions get sums up to the difference of the two scores, up to the error of the integration.
- feature maps (convolutions): gradient times activation at the last layer group whose map is not too coarse. This is
  HiResCAM (Draelos & Carin 2020), which equals Grad-CAM (Selvaraju et al. 2017) at the last layer of a network that
  ends in global average pooling and a linear head, and, unlike Grad-CAM, keeps to the gradient at other layers.

The score is the log odds of a class: of several classes of which one is right, the log of its probability over that of
all others together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.data.labels import SINGLE_LABEL
from hf_transfer.errors import UserError
from hf_transfer.features.batches import Batch
from hf_transfer.features.cut import CallKey, Refused
from hf_transfer.features.layouts import Layout, sides
from hf_transfer.features.places import Place, find_places
from hf_transfer.features.replay import observe
from hf_transfer.features.stand_ins import patched
from hf_transfer.inference.exported import check_weights
from hf_transfer.layers.forward_pass import REFUSALS
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.side_effects import untouched

STEPS = 16  # of the integral, by Gauss-Legendre quadrature
_ROWS = 16  # examples in a forward pass
_LEAST = 4  # positions per side of a map: coarser ones show next to nothing


@dataclass(frozen=True)
class Spots:
    """Attributions of one input.

    Attributes:
        values: (positions,) of a text, (rows, columns) of an image, in the order of the input; in log odds, or for a
            regression in units of its value.
        blank: score of the blank input; None where no blank input was used.
        score: of the input.
    """

    values: torch.Tensor
    score: float
    blank: float | None = None


class Attribution:
    """A model whose answers are explained.

    Args:
        model: in eval mode.
        problem_type: as in `transformers` configurations.
        batch: a few different inputs as the model reads them, on its device.

    Raises:
        UserError: the model is an exported one, or no place was found at which it can be entered.
    """

    def __init__(self, model: nn.Module, problem_type: str, batch: Batch):
        check_weights(model, "explain")
        self.model, self.problem_type = model, problem_type
        groups = layer_groups(model)
        try:
            with untouched(model):  # which is tried with other sizes; Swin keeps the smallest that it has seen
                found = find_places(model, groups, batch)
        except (Refused, *REFUSALS) as error:
            raise self._impossible(str(error)) from error
        places = [found.by_group.get(group.name) for group in groups[:-1]]
        self.places = [p for p in places if p is not None and isinstance(p.layout, Layout)]
        if not self.places:
            raise self._impossible(next(iter(found.refused.values()), "no layer has positions"))
        self.is_text = _layout(self.places[0]).is_text
        self.has_maps = bool(found.by_group) and not self.is_text and self._dimensions(batch) == 4

    def _impossible(self, reason: str) -> UserError:
        return UserError(f"{type(self.model).__name__} cannot be explained: {reason.rstrip('.')}.", key="explain")

    def _dimensions(self, batch: Batch) -> int:
        """Axes of the output of the first layer group: 4 of feature maps."""
        return _value(self.model, self.places[0], batch).dim()

    @property
    def method(self) -> str:
        """Its name, for display."""
        return "gradient times activation (HiResCAM)" if self.has_maps else "integrated gradients"

    def of(self, batch: Batch, blank: Batch, chosen: int) -> Spots:
        """Attributions of one input.

        Args:
            batch: one input, on the model's device.
            blank: the same without content: words masked, or an image of one color.
            chosen: index of the output that is explained.
        """
        with _fixed(self.model):
            return self._map(batch, chosen) if self.has_maps else self._integrated(batch, blank, chosen)

    def _integrated(self, batch: Batch, blank: Batch, chosen: int) -> Spots:
        from captum.attr import IntegratedGradients

        place = self.places[0]
        upper = _Upper(self.model, place, self.problem_type, chosen, tuple(batch))
        value, start = (_value(self.model, place, one) for one in (batch, blank))
        values, begin = (upper.arranged(one) for one in (value, start))
        inputs = tuple(batch.values())
        found = IntegratedGradients(upper).attribute(
            values, baselines=begin, additional_forward_args=inputs, n_steps=STEPS, internal_batch_size=_ROWS
        )
        layout = _layout(place)
        rows = found.detach().flatten(2).sum(1)[0]
        with torch.no_grad():
            scores = [float(upper(one, *inputs)[0]) for one in (values, begin)]
        if not self.is_text:
            rows = self._grid(rows, layout, batch)
        return Spots(rows.float().cpu(), *scores)

    def _grid(self, rows: torch.Tensor, layout: Layout, batch: Batch) -> torch.Tensor:
        """(rows, columns) of the patches among the positions of an image."""
        patches = rows[[i for i in range(len(rows)) if i not in layout.skipped]]
        height, width = batch["pixel_values"].shape[-2:]
        size = sides(len(patches), int(height), int(width))
        if size is None:
            raise self._impossible(f"its {len(patches)} positions are no grid of patches of the image")
        return patches.view(size)

    def _map(self, batch: Batch, chosen: int) -> Spots:
        from captum.attr import InputXGradient

        found = None
        for place in reversed(self.places):
            value = _value(self.model, place, batch)
            upper = _Upper(self.model, place, self.problem_type, chosen, tuple(batch))
            arranged = upper.arranged(value)
            if arranged.dim() != 4 or min(arranged.shape[2:]) < _LEAST:
                continue
            inputs = tuple(batch.values())
            found = (
                InputXGradient(upper).attribute(arranged.requires_grad_(True), additional_forward_args=inputs).detach()
            )
            with torch.no_grad():
                score = float(upper(arranged.detach(), *inputs)[0])
            if bool(found.any()):
                break
        if found is None:
            raise self._impossible(f"none of its layers has a map of {_LEAST} by {_LEAST} positions for this image")
        return Spots(found.sum(1)[0].float().cpu(), score)


class _Upper(nn.Module):
    """The part of a model above a place, as captum takes it: from the output there to a score per example.

    Args:
        model: the whole.
        place: where it is entered.
        problem_type: as in `transformers` configurations.
        chosen: index of the output that is explained.
        names: of the model's inputs, which `forward` takes after the output.
    """

    def __init__(self, model: nn.Module, place: Place, problem_type: str, chosen: int, names: Sequence[str]):
        super().__init__()
        self.whole = (model,)  # not a submodule: captum would look for its layers
        self.place, self.problem_type, self.chosen, self.names = place, problem_type, chosen, names

    def arranged(self, value: torch.Tensor) -> torch.Tensor:
        """(examples, features, positions …) of the output at the place."""
        return value.permute(self._order(value.dim()))

    def _order(self, axes: int) -> list[int]:
        layout = _layout(self.place)
        return [layout.batch, layout.channel, *(i for i in range(axes) if i not in (layout.batch, layout.channel))]

    def forward(self, arranged: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """(examples,) scores."""
        order = self._order(arranged.dim())
        value = arranged.permute([order.index(i) for i in range(len(order))])
        key, is_input, leaf = self.place.spot

        def put(values: Any) -> Any:
            leaves, spec = pytree.tree_flatten(values)
            leaves[leaf] = value.to(leaves[leaf].dtype).clone()  # a model may write into it
            return pytree.tree_unflatten(leaves, spec)

        def answer(call: CallKey, own_forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if call != key:
                return own_forward(*args, **kwargs)
            if is_input:
                args, kwargs = put((args, kwargs))
                return own_forward(*args, **kwargs)
            return put(own_forward(*args, **kwargs))

        (model,) = self.whole
        with patched(model, [key[0]], answer):
            logits = model(**dict(zip(self.names, inputs, strict=True))).logits.float()
        own = logits[:, self.chosen]
        if self.problem_type != SINGLE_LABEL:
            return own
        others = logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) == self.chosen, -math.inf)
        return own - others.logsumexp(1)


def _layout(place: Place) -> Layout:
    assert isinstance(place.layout, Layout)
    return place.layout


def _value(model: nn.Module, place: Place, batch: Batch) -> torch.Tensor:
    """The output at a place for a batch."""
    seen: list[torch.Tensor] = []
    key, is_input, leaf = place.spot
    observe(model, [(key, is_input)], batch, lambda _, leaves: seen.append(leaves[leaf].detach().clone()))
    return seen[0]


@contextlib.contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter requires a gradient, which below the place would be computed for nothing."""
    changed = [p for p in model.parameters() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
