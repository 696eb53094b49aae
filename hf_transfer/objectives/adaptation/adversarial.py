"""Domain-adversarial training (Ganin et al. 2016): a discriminator, and a gradient that is reversed below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_transfer.objectives.objective import Batch, Penalty

HIDDEN = 256  # units of the discriminator


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.factor * gradient, None


def reverse(values: torch.Tensor, factor: float) -> torch.Tensor:
    """The values themselves; their gradient is multiplied by -factor (Ganin et al. 2016, section 4.2)."""
    reversed_below: torch.Tensor = _Reverse.apply(values, factor)
    return reversed_below


def discriminator(width: int, seed: int) -> nn.Module:
    """A two-layer perceptron from features of so many numbers to one logit: positive for the target.

    It reads each example's features normalized to mean 0 and variance 1 (without parameters of its own): the backbone
    cannot deceive it by their size alone. The global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        normalized = nn.LayerNorm(width, elementwise_affine=False)
        return nn.Sequential(normalized, nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def confusion(critic: nn.Module, features: torch.Tensor, domain: torch.Tensor, factor: float) -> torch.Tensor:
    """The discriminator's cross-entropy, a mean over the examples, whose gradient is reversed below the features.

    Args:
        critic: the discriminator.
        features: (examples, width).
        domain: (examples,), 0 of the source and 1 of the target.
        factor: of the reversed gradient.
    """
    logits = critic(reverse(features, factor)).squeeze(-1)
    return functional.binary_cross_entropy_with_logits(logits, domain.to(logits))


@dataclass(frozen=True)
class Adversarial(Penalty):
    """A penalty whose own module minimizes it, and which the model maximizes, with a weight.

    `function` is called with (module, model, batch, outputs, weight). The weight scales only what reaches the model, so
    that the module learns from the first step on, where a ramp is still at 0.
    """

    def term(self, model: nn.Module, batch: Batch, outputs: Any, step: int) -> torch.Tensor:
        value: torch.Tensor = self.function(self.module, model, batch, outputs, self.weight(step))  # type: ignore[call-arg]
        return value
