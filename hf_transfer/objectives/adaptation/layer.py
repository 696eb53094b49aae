"""The features that are aligned: what a forward pass computes at a layer, with their gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.features.batches import positions_of
from hf_transfer.features.cut import CallKey
from hf_transfer.features.layouts import HEAD_INPUT, MEAN, HeadInput
from hf_transfer.features.places import Place
from hf_transfer.features.stand_ins import patched
from hf_transfer.objectives.objective import Batch


class LayerFeatures:
    """What the head reads, or the mean of a layer group's output over tokens, patches or pixels.

    It is pooled as soon as it is there, because a model may write into it later.

    Args:
        place: where it is.
    """

    def __init__(self, place: Place):
        self.place = place
        self.pooling = HEAD_INPUT if isinstance(place.layout, HeadInput) else MEAN
        self._vectors: torch.Tensor | None = None

    @property
    def width(self) -> int:
        return self.place.layout.width

    @contextlib.contextmanager
    def watching(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Within the context, the features of a forward pass are kept.

        Args:
            model: not wrapped.
            batch: of the forward pass.
        """
        wanted, is_input, leaf = self.place.spot
        mask = positions_of(batch)

        def keep(values: Any) -> None:
            value = pytree.tree_leaves(values)[leaf]
            self._vectors = self.place.layout.pooled(value, [self.pooling], mask)[self.pooling]

        def answer(
            call: CallKey, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if call == wanted and is_input:
                keep((args, kwargs))
            output = own_forward(*args, **kwargs)
            if call == wanted and not is_input:
                keep(output)
            return output

        self._vectors = None
        with patched(model, [wanted[0]], answer):
            yield

    def take(self) -> torch.Tensor:
        """(examples, width), at least in fp32, of the last forward pass; they are kept no longer."""
        assert self._vectors is not None, "no forward pass was watched"
        vectors, self._vectors = self._vectors, None
        return vectors
