"""On which rented GPU a run fits, how long it takes there and what it costs: estimates, not measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_transfer.analysis.budget import OVERHEAD, StageMemory
from hf_transfer.analysis.prices import Gpu, Prices

# Fraction of a GPU's half-precision peak that training reaches. In float32 without tensor cores the peak itself is an
# eighth (T4, V100) to a sixteenth (A100, H100) of that; data sheets of the GPUs.
HALF, FULL = 0.3, 0.03


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Attributes:
        operations: floating-point operations of all training steps; None where they are not known.
        is_half: whether matrix products are in half precision.
        needs_bf16: whether they are in bfloat16.
    """

    operations: float | None
    is_half: bool
    needs_bf16: bool

    @property
    def utilization(self) -> float:
        """Fraction of the half-precision peak that is assumed."""
        return HALF if self.is_half else FULL


@dataclass(frozen=True)
class Offer:
    """A run on one GPU.

    Attributes:
        gpu: of the price table.
        why_not: why the run does not fit; empty if it does.
        batch: examples in a batch on the GPU: those asked for, or as many as fit.
        accumulation: batches in an optimizer step, so that it sees as many examples as asked for.
        largest_batch: examples that fit; None where activations are not known.
        hours: of training; None where the work is not known or nothing fits.
    """

    gpu: Gpu
    why_not: str
    batch: int
    accumulation: int
    largest_batch: int | None
    hours: float | None

    @property
    def cost(self) -> float | None:
        """Dollars on demand."""
        return None if self.hours is None else self.hours * self.gpu.price

    @property
    def spot_cost(self) -> float | None:
        """Dollars on a spot machine, without what is computed again after it was taken away."""
        return None if self.hours is None else self.hours * self.gpu.spot

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.gpu),
            "fits": not self.why_not,
            "why_not": self.why_not,
            "batch": self.batch,
            "accumulation": self.accumulation,
            "largest_batch": self.largest_batch,
            "hours": self.hours,
            "cost": self.cost,
            "spot_cost": self.spot_cost,
        }


def offers(memory: Sequence[StageMemory], work: Work, prices: Prices, accumulation: int) -> list[Offer]:
    """The run on each GPU.

    Args:
        memory: by stage.
        work: what is computed.
        prices: the GPUs.
        accumulation: batches in an optimizer step, as asked for.
    """
    return [_offer(memory, work, gpu, accumulation) for gpu in prices.gpus]


def _offer(memory: Sequence[StageMemory], work: Work, gpu: Gpu, accumulation: int) -> Offer:
    asked = memory[0].batch
    room = round(gpu.memory_gb * 1e9) - OVERHEAD
    largest = [_largest(stage, room) for stage in memory]
    known = [size for size in largest if size is not None]
    most = min(known) if known else None
    smallest_total = max(stage.total(0 if stage.activations is None else 1) for stage in memory)
    why_not = ""
    if smallest_total > room:
        left = f"{max(room, 0) / 1e9:.3g} GB are left beside CUDA's own {OVERHEAD / 1e9:g} GB"
        why_not = f"one example takes {smallest_total / 1e9:.3g} GB, and {left}"
    elif work.needs_bf16 and not gpu.bf16:
        why_not = "no bfloat16"
    batch = max(1, asked if most is None else min(asked, most))
    hours = None
    if work.operations is not None and not why_not:
        hours = work.operations / (gpu.tflops * 1e12 * work.utilization) / 3600
    return Offer(gpu, why_not, batch, math.ceil(asked * accumulation / batch), most, hours)


def _largest(stage: StageMemory, room: int) -> int | None:
    """Examples of a batch that fit; None if activations are not known or do not grow with the batch."""
    if stage.activations is None or not stage.activations.per_example:
        return None
    left = room - stage.without_activations - stage.activations.fixed
    return max(0, left // stage.activations.per_example)


def fastest(choices: Sequence[Offer]) -> Offer | None:
    return min((o for o in choices if o.hours is not None), key=lambda o: o.hours or 0.0, default=None)


def cheapest(choices: Sequence[Offer], spot: bool = False) -> Offer | None:
    """On demand, or as a spot machine."""
    costs = [(o.spot_cost if spot else o.cost, i) for i, o in enumerate(choices)]
    known = [(cost, i) for cost, i in costs if cost is not None]
    return choices[min(known)[1]] if known else None
