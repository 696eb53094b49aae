"""The methods of `domain_adaptation` as penalties: one function per name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_transfer.config.arguments.adaptation import CORAL, DANN, MMD
from hf_transfer.data.pairs import DOMAIN
from hf_transfer.objectives.adaptation.adversarial import Adversarial, confusion, discriminator
from hf_transfer.objectives.adaptation.coral import coral
from hf_transfer.objectives.adaptation.layer import LayerFeatures
from hf_transfer.objectives.adaptation.mmd import mmd
from hf_transfer.objectives.objective import Batch, Penalty

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What a method is made of.

    Attributes:
        features: that are aligned.
        weight: of the penalty at an optimizer step.
        learning_rate: of a discriminator.
        seed: of a discriminator's weights.
    """

    features: LayerFeatures
    weight: Callable[[int], float]
    learning_rate: float
    seed: int


def penalty_of(method: str, settings: Settings) -> Penalty:
    """The penalty of a method; it reads batches of `data.pairs`, and computes at least in fp32."""
    return _METHODS[method](settings)


def _distance(name: str, distance: Distance) -> Callable[[Settings], Penalty]:
    def make(settings: Settings) -> Penalty:
        def function(module: nn.Module | None, model: nn.Module, batch: Batch, outputs: Any) -> torch.Tensor:
            with _full_precision(batch):
                vectors, is_target = settings.features.take(), batch[DOMAIN].bool()
                return distance(vectors[~is_target], vectors[is_target])

        return Penalty(name, settings.weight, None, function, settings.features.watching)

    return make


def _dann(settings: Settings) -> Penalty:
    def function(critic: nn.Module, model: nn.Module, batch: Batch, outputs: Any, weight: float) -> torch.Tensor:
        with _full_precision(batch):
            return confusion(critic, settings.features.take(), batch[DOMAIN], weight)

    critic = discriminator(settings.features.width, settings.seed)
    watch, rate = settings.features.watching, settings.learning_rate
    return Adversarial(DANN, settings.weight, critic, function, watch, rate)  # type: ignore[arg-type]


def mmd_of_directions(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`mmd` of each example's features normalized to mean 0 and variance 1, as the discriminator of `dann` reads them.

    Where one domain has larger features, such as digits on photographs next to digits on black, features as they
    are differ in size above all, and drawing sizes together costs accuracy (`docs/domain-adaptation.md`).
    """
    own, other = (functional.layer_norm(one, one.shape[1:]) for one in (source, target))
    return mmd(own, other)


def _full_precision(batch: Batch) -> torch.autocast:
    return torch.autocast(batch[DOMAIN].device.type, enabled=False)


_METHODS: dict[str, Callable[[Settings], Penalty]] = {
    MMD: _distance(MMD, mmd_of_directions),
    CORAL: _distance(CORAL, coral),
    DANN: _dann,
}
