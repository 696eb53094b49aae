"""Penalties on the distance of weights from what they were: L2-SP and elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from hf_transfer.objectives.objective import Penalty

Names = Callable[[], Collection[str]]


class Anchors:
    """The values of some parameters, by name, as they are when this is made."""

    def __init__(self, model: nn.Module, names: Collection[str]):
        self._values = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def of(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The value, on the device of `like`."""
        value = self._values[name]
        if value.device != like.device:
            value = self._values[name] = value.to(like.device)
        return value


def l2_sp(alpha: float, beta: float, anchors: Anchors, fresh: Names) -> list[Penalty]:
    """alpha/2 ||w - w0||² over the pretrained weights, and beta/2 ||w||² over the others (Xuhong et al. 2018, eq. 4).

    Args:
        alpha: strength of the first.
        beta: strength of the second.
        anchors: w0, of all weights that train.
        fresh: names of those that are not pretrained.
    """

    def pull(module: Any, model: nn.Module, batch: Any, outputs: Any) -> torch.Tensor:
        left_out = set(fresh())
        named = [(n, p) for n, p in model.named_parameters() if n in anchors and n not in left_out]
        return _sum(p.device for _, p in named)(_half_square(p, anchors.of(n, p)) for n, p in named)

    def decay(module: Any, model: nn.Module, batch: Any, outputs: Any) -> torch.Tensor:
        wanted = set(fresh())
        own = [p for n, p in model.named_parameters() if n in wanted]
        return _sum(p.device for p in own)(_half_square(p) for p in own)

    return [
        Penalty("l2_sp_alpha", lambda step: alpha, None, pull),
        Penalty("l2_sp_beta", lambda step: beta, None, decay),
    ]


def ewc(strength: float, anchors: Anchors, fisher: Mapping[str, torch.Tensor], fresh: Names) -> Penalty:
    """strength/2 Σ F (w - w0)² over the pretrained weights (Kirkpatrick et al. 2017, eq. 3).

    Args:
        strength: λ.
        anchors: w0.
        fisher: F, the diagonal of the Fisher information at w0, by name.
        fresh: names of weights that are not pretrained.
    """
    diagonal = dict(fisher)

    def pull(module: Any, model: nn.Module, batch: Any, outputs: Any) -> torch.Tensor:
        left_out = set(fresh())
        named = [(n, p) for n, p in model.named_parameters() if n in anchors and n in diagonal and n not in left_out]
        for name, p in named:
            if diagonal[name].device != p.device:
                diagonal[name] = diagonal[name].to(p.device)
        return _sum(p.device for _, p in named)(_half_square(p, anchors.of(n, p), diagonal[n]) for n, p in named)

    return Penalty("ewc_lambda", lambda step: strength, None, pull)


def _sum(devices: Any) -> Callable[[Any], torch.Tensor]:
    """A function that adds scalars up on the first of some devices."""
    device = next(iter(devices), torch.device("cpu"))

    def add(terms: Any) -> torch.Tensor:
        found = [term.to(device) for term in terms]
        return torch.stack(found).sum() if found else torch.zeros((), device=device)

    return add


class _HalfSquare(torch.autograd.Function):
    """½ Σ f (w - w0)², without keeping w - w0 until the backward pass, which would take as much memory as the model."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, w0: torch.Tensor | None, f: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(w, w0, f)
        distance = _distance(w, w0)
        squares = distance.square() if f is None else distance.square() * f.to(distance)
        return squares.sum() / 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        w, w0, f = ctx.saved_tensors
        slope = _distance(w, w0)
        slope = slope if f is None else slope * f.to(slope)
        return (slope * gradients[0]).to(w.dtype), None, None


def _distance(w: torch.Tensor, w0: torch.Tensor | None) -> torch.Tensor:
    """In at least fp32."""
    kind = torch.float64 if w.dtype == torch.float64 else torch.float32
    return w.to(kind) if w0 is None else w.to(kind) - w0.to(kind)


def _half_square(w: torch.Tensor, w0: torch.Tensor | None = None, f: torch.Tensor | None = None) -> torch.Tensor:
    value: torch.Tensor = _HalfSquare.apply(w, w0, f)
    return value
