"""The budget of a run: memory by stage, GPUs, money; as lines to read and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_transfer.analysis.budget import OVERHEAD, StageMemory
from hf_transfer.analysis.gpus import Offer, Work, cheapest, fastest
from hf_transfer.analysis.pace import Pace, in_time
from hf_transfer.analysis.prices import Prices

# By what they save, with what costs least first in each.
SAVINGS = (
    "of activations, a smaller per_device_train_batch_size with more gradient_accumulation_steps, shorter inputs "
    "(max_seq_length, image_size), activation_checkpointing: true; of gradients and optimizer states, adapter: lora, "
    "strategy: linear-probe, optim: adafactor; of everything, launch: fsdp2 on several GPUs, or a smaller model"
)


@dataclass(frozen=True)
class Budget:
    """What a run takes.

    Attributes:
        memory: by stage, on one device.
        accumulation: batches in an optimizer step, as asked for.
        device: on which the dry steps ran; empty without data.
        work: what is computed.
        prices: the table of GPUs.
        offers: the run on each GPU.
        notes: what is not counted, and why.
        here: how long it trains on this machine; None where that is not known.
    """

    memory: tuple[StageMemory, ...]
    accumulation: int
    device: str
    work: Work
    prices: Prices
    offers: tuple[Offer, ...]
    notes: list[str] = field(default_factory=list)
    here: Pace | None = None

    @property
    def of_process(self) -> int | None:
        """Most bytes of this process's memory, its libraries and all, from the measured steps; None if not known.

        At the end, the model that was saved is loaded once more and compared: its file is mapped into memory while it
        is copied, and the process still holds what the C library kept of the steps.
        """
        if self.here is None or self.here.resident is None or not self.memory:
            return None
        most = 0
        for stage, pace in zip(self.memory, self.here.stages, strict=True):
            if pace.memory is None or pace.kept is None or stage.optimizer is None:
                return None
            step = pace.memory
            if self.accumulation > 1 and stage.activations:  # gradients stay while the next batch is computed
                step = max(step, stage.gradients + stage.activations.of_batch(stage.batch))
            at_end = pace.kept + 2 * (stage.parameters + stage.buffers)
            most = max(most, stage.optimizer + stage.boundary_cache + max(step, at_end))
        return self.here.resident + most

    @property
    def largest_here(self) -> int | None:
        """Examples of a batch that this machine's free memory holds, by the measured steps; None where not known."""
        if self.here is None or self.here.free is None or not self.memory:
            return None
        sizes = []
        for stage, pace in zip(self.memory, self.here.stages, strict=True):
            if pace.memory is None or stage.optimizer is None:
                return None
            left = self.here.free - stage.optimizer - stage.boundary_cache - stage.gradients
            sizes.append(stage.batch * max(0, left) // max(1, pace.memory - stage.gradients))
        return min(sizes)

    def to_dict(self) -> dict[str, Any]:
        best = {
            "cheapest": cheapest(self.offers),
            "cheapest_spot": cheapest(self.offers, spot=True),
            "fastest": fastest(self.offers),
        }
        return {
            "stages": [stage.to_dict() for stage in self.memory],
            "batch": self.memory[0].batch,
            "accumulation": self.accumulation,
            "activations": f"estimate: saved by autograd on {self.device}" if self.device else None,
            "overhead_bytes": OVERHEAD,
            "operations": self.work.operations,
            "utilization": self.work.utilization,
            "prices_date": self.prices.date,
            "gpus": [{**offer.to_dict(), "is_estimate": True} for offer in self.offers],
            **{name: offer.gpu.name if offer else None for name, offer in best.items()},
            "this_machine": self._this_machine(),
            "notes": self.notes,
        }

    def _this_machine(self) -> dict[str, Any] | None:
        if self.here is None:
            return None
        return {**self.here.to_dict(), "process_bytes": self.of_process, "largest_batch": self.largest_here}

    def lines(self) -> list[str]:
        """For display."""
        batch = self.memory[0].batch
        lines = [
            f"Memory on one device, batches of {batch}"
            + (" (activations: an estimate, from the longest example):" if self.device else " (without activations):")
        ]
        lines += _table(
            [("stage", "model", "gradients", "optimizer", "activations", "total")]
            + [_memory_row(i + 1, stage) for i, stage in enumerate(self.memory)]
        )
        if self.here:
            lines.append(self.here.line())
            lines += self._process()
        lines += self._money()
        return [*lines, *(f"Budget: {note}." for note in self.notes)]

    def _process(self) -> list[str]:
        most = self.of_process
        if most is None:
            return []
        assert self.here is not None and self.here.resident is not None, "else the most is not known"
        now = in_bytes(self.here.resident)
        line = f"The process will take about {in_bytes(most)} of memory at most ({now} before training, measured)."
        return [line, *self._fits()]

    def _fits(self) -> list[str]:
        """What to do about batches that do not fit this machine."""
        asked, most = self.memory[0].batch, self.largest_here
        if most is None or most >= asked:
            return []
        assert self.here is not None and self.here.free is not None, "else the most is not known"
        free = in_bytes(self.here.free)
        if not most:
            return [f"Warning: {free} of memory are free, too little for a step. What saves memory: {SAVINGS}."]
        steps = math.ceil(asked * self.accumulation / most)
        return [
            f"Warning: {free} of memory are free, enough for batches of {most}: per_device_train_batch_size: {most}, "
            f"gradient_accumulation_steps: {steps}."
        ]

    def _money(self) -> list[str]:
        if not self.offers:
            return []
        if all(offer.why_not for offer in self.offers):
            reasons = "; ".join(f"{offer.gpu.name}: {offer.why_not}" for offer in self.offers)
            return [f"The run fits none of the GPUs ({reasons}). What saves memory: {SAVINGS}."]
        if self.work.operations is None:
            known = [offer.gpu.name for offer in self.offers if not offer.why_not]
            what = "this" if self.device else "this much, without activations"
            return [f"GPUs with room for {what}: {', '.join(known)}."]
        condition = "" if self.device else ", if activations fit as well"
        precision = "" if self.work.is_half else " (the run is in float32)"
        lines = [
            f"GPUs{condition}, an estimate: at {self.work.utilization:.0%} of the half-precision peak{precision}, "
            f"training steps only, prices of {self.prices.date}:"
        ]
        lines += _table([("GPU", "memory", "batch", "time", "on demand", "spot"), *map(_offer_row, self.offers)])
        return [*lines, self._best()]

    def _best(self) -> str:
        cheap, spot, fast = cheapest(self.offers), cheapest(self.offers, spot=True), fastest(self.offers)
        assert cheap and spot and fast, "something fits and its work is known"
        saving = 1 - (spot.spot_cost or 0.0) / cheap.cost if cheap.cost else 0.0
        return (
            f"Cheapest: {cheap.gpu.name}. Fastest: {fast.gpu.name}. Spot ({spot.gpu.name}) saves {saving:.0%}; a spot "
            "machine may be taken away, so save checkpoints and resume."
        )


def _memory_row(number: int, stage: StageMemory) -> tuple[str, ...]:
    activations = stage.activations.of_batch(stage.batch) if stage.activations else None
    cells = (stage.parameters + stage.buffers, stage.gradients, stage.optimizer, activations, stage.total())
    return (f"{number} {stage.stage}", *("not known" if cell is None else in_bytes(cell) for cell in cells))


def _offer_row(offer: Offer) -> tuple[str, ...]:
    name, memory = offer.gpu.name, f"{offer.gpu.memory_gb:g} GB"
    if offer.why_not:
        return name, memory, f"does not fit: {offer.why_not}", "", "", ""
    batch = str(offer.batch) + (f" x {offer.accumulation}" if offer.accumulation > 1 else "")
    return name, memory, batch, _time(offer.hours), _money(offer.cost), _money(offer.spot_cost)


def _time(hours: float | None) -> str:
    if hours is None:
        return "not known"
    return "under 1 s" if hours * 3600 < 1 else in_time(hours * 3600)


def _money(dollars: float | None) -> str:
    if dollars is None:
        return "not known"
    return "under $0.01" if dollars < 0.01 else f"${dollars:,.2f}"


def in_bytes(count: float) -> str:
    """In B, KB, MB or GB, powers of 1000."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB" if count >= 100 else f"{count:.3g} GB"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width; a cell before empty ones may be longer."""
    full = [row for row in rows if all(row)]
    widths = [max(len(row[c]) for row in full) for c in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
