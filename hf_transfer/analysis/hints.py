"""Advice before training, from the plan and the data: learning rates that cannot work, and inputs larger than needed.

Only what was measured is said: a rate against what its optimizer takes, tokens and pixels that would not be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_transfer.data.bucketing import LengthSampler, padding
from hf_transfer.errors import UserError
from hf_transfer.layers.architectures import HEAD
from hf_transfer.models.image_size import own_size, with_image_size
from hf_transfer.plan.plan import Plan

WORTH = 1.5  # times less to compute, from which an input size is worth a line
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SIDE_UNIT = 32  # pixels; sides are multiples of it
_LEAST_SIDE = 64  # below, a network of stride 32 sees a single position
_SAMPLE = 20_000  # texts
_NOTHING = 1e-6  # a weight that moves by less over a whole run has not been trained


@dataclass(frozen=True)
class _Range:
    """Learning rates that an optimizer takes.

    Attributes:
        usual: for pretrained layers, in words.
        pretrained: above it pretrained layers are destroyed, whatever the model.
        new: the same for layers without pretrained weights: a head, adapters, a model from scratch.
    """

    usual: str
    pretrained: float
    new: float


# By the beginning of `optim`. An Adam step changes each weight by about the rate, and a Lion step by exactly it, while
# pretrained weights are mostly around 0.02; an SGD step is as large as the gradient times the rate, and linear probes
# on frozen features are trained at rates up to 30 (MoCo: He et al. 2020, section 4.1).
_RANGES: dict[str, _Range] = {
    "adam": _Range("1e-6 to 1e-3", 1e-2, 1.0),
    "lion": _Range("1e-7 to 3e-4", 3e-3, 0.3),
    "sgd": _Range("1e-4 to 0.1", 1.0, 100.0),
}
_SIGN_LIKE = ("adam", "lion")  # steps no larger than about the rate


def rate_hints(plan: Plan, optim: str, is_new: bool, steps: int) -> Iterator[str]:
    """Learning rates far outside of what the optimizer takes; nothing of an optimizer without known ranges.

    Args:
        plan: resolved.
        optim: name of the optimizer.
        is_new: whether what trains below the head has no pretrained weights: adapters, or a model from scratch.
        steps: optimizer steps of the run.
    """
    family = next((name for name in _RANGES if optim.removeprefix("paged_").startswith(name)), None)
    if family is None:
        return
    takes = _RANGES[family]
    rates = {
        kind: [rate for stage in plan.stages for name, rate in _rates(stage) if (name == HEAD) == (kind == HEAD)]
        for kind in (HEAD, "layers")
    }
    limits = {HEAD: takes.new, "layers": takes.new if is_new else takes.pretrained}
    for kind, found in rates.items():
        if found and max(found) > limits[kind]:
            what = {HEAD: "the head", "layers": "new layers" if is_new else "pretrained layers"}[kind]
            usual = f"; {takes.usual} is usual" if kind != HEAD and not is_new else ""
            yield (
                f"a learning rate of {max(found):.3g} for {what} is far above what {optim} can train with (at most "
                f"about {limits[kind]:g}{usual}): expect the loss to diverge. Lower "
                f"{'head_learning_rate or learning_rate' if kind == HEAD else 'learning_rate'}."
            )
    highest = max((max(found) for found in rates.values() if found), default=0.0)
    if family in _SIGN_LIKE and highest * steps < _NOTHING:
        yield (
            f"with a learning rate of at most {highest:.3g}, {steps:,} steps of {optim} move no weight by more than "
            f"about {highest * steps:.1g}: nothing will be learned. Raise learning_rate."
        )


def _rates(stage: Any) -> Iterator[tuple[str, float]]:
    yield from zip(stage.trainable, stage.highest or stage.rates, strict=True)


def length_hint(lengths: torch.Tensor, batch: int, is_bucketed: bool, median_characters: float | None) -> str:
    """A shorter `max_seq_length`, if it would leave far fewer tokens; empty if it would not.

    At least half of the texts stay (nearly) whole.

    Args:
        lengths: (examples,) tokens of the training texts as they are fed to the model.
        batch: examples that are padded together.
        is_bucketed: whether batches have texts of similar length.
        median_characters: of a text, if it is known.
    """
    sample = lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))[:_SAMPLE]]
    if not len(sample):
        return ""
    median = float(sample.float().median())
    shorter = next((length for length in _LENGTHS if length >= 0.95 * median), None)
    if shorter is None or shorter >= float(sample.max()):
        return ""
    gain = computed_tokens(sample, batch, is_bucketed) / computed_tokens(sample.clamp(max=shorter), batch, is_bucketed)
    if gain < WORTH:
        return ""
    cut = float((sample > shorter).float().mean())
    size = (
        f"{median_characters:,.0f} characters ({median:,.0f} tokens)" if median_characters else f"{median:,.0f} tokens"
    )
    return (
        f"The median text has {size}, the longest {float(sample.max()):,.0f} tokens: --max_seq_length {shorter} would "
        f"compute {gain:.1f} times fewer tokens, padding included, and truncate {cut:.0%} of the texts."
    )


def computed_tokens(lengths: torch.Tensor, batch: int, is_bucketed: bool) -> float:
    """Tokens of an epoch, padding included."""
    order = LengthSampler(lengths, batch, 0).order() if is_bucketed else torch.arange(len(lengths))
    return float(lengths.sum()) / (1 - padding(lengths, order, batch))


def image_size_hint(
    sizes: Mapping[str, Sequence[float]], config: PreTrainedConfig, build: Callable[[Any], PreTrainedModel]
) -> str:
    """A smaller `image_size`, if the pictures are smaller than what they are enlarged to; empty if not.

    Args:
        sizes: (minimum, median, 95th percentile, maximum) of `width` and `height` in pixels.
        config: of the model.
        build: makes a model from a configuration.
    """
    own = own_size(config)
    if own is None or not {"width", "height"} <= set(sizes):
        return ""
    side = max(sizes["width"][2], sizes["height"][2])
    smaller = max(_LEAST_SIDE, -int(-side // _SIDE_UNIT) * _SIDE_UNIT)
    gain = (own / smaller) ** 2
    if gain < WORTH:
        return ""
    try:
        with_image_size(config, smaller, build)
    except UserError:  # the architecture reads no such size
        return ""
    return (
        f"95% of the pictures have at most {side:,.0f} px a side and are enlarged to {own}: --image_size {smaller} "
        f"would compute {gain:.1f} times fewer pixels. A model trained at {own} may then be less accurate: compare."
    )
