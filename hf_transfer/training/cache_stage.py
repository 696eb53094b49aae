"""The boundary cache in one stage of a plan: whether it is on, where it is kept, and what it gains."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_transfer.features.cut import Cut
from hf_transfer.features.examples import TRAINING
from hf_transfer.features.store import Store

_TIMED = 16  # one of so many micro-batches is timed on an accelerator, which has to finish for that
_NOTICEABLE = 1.05  # expected speedup that is worth a number
Form = tuple[tuple[int, ...], torch.dtype]  # shape of one example, dtype


class Place(enum.StrEnum):
    """Where recorded outputs are kept."""

    MEMORY = "memory"
    DISK = "disk"


class OffReason(enum.StrEnum):
    """Why a stage trains without the cache."""

    NOT_FIXED = "not fixed"
    STREAM = "stream"
    SHARDED = "sharded"
    DATA_PARALLEL = "data parallel"
    COMPILED = "compiled"
    INPUT_TRAINS = "input trains"
    RANDOM_EXAMPLES = "random examples"
    NOT_RUNNABLE = "not runnable"
    NOT_TRACEABLE = "not traceable"
    NOT_EXACT = "not exact"
    AVERAGED = "averaged"
    AS_BEFORE = "as before"
    NO_ROOM = "no room"
    NOT_WORTHWHILE = "not worthwhile"
    NOT_RECORDED = "not recorded"
    EXAMPLE_CHANGED = "example changed"


_SENTENCES = {
    OffReason.STREAM: "the training set is a stream, whose examples cannot be recognized in the next epoch",
    OffReason.SHARDED: "FSDP or DeepSpeed shards the parameters over several devices",
    OffReason.DATA_PARALLEL: "one process trains on several GPUs; launch one process per GPU",
    OffReason.COMPILED: "torch_compile has compiled the layers that would be skipped",
    OffReason.INPUT_TRAINS: "{}, the input layer, trains",
    OffReason.RANDOM_EXAMPLES: "the examples differ each time they are read (live augmentation)",
    OffReason.NOT_RUNNABLE: "the model cannot be run on a sample ({})",
    OffReason.NOT_TRACEABLE: "the frozen part of the model cannot be traced ({})",
    OffReason.NOT_EXACT: "the frozen part cannot be replayed exactly: {}",
    OffReason.AVERAGED: "with ema_decay, layers that are frozen again are evaluated with their average, not as trained",
    OffReason.AS_BEFORE: "it was off when the run began",
    OffReason.NOT_WORTHWHILE: "it would save only {} of the operations, recording included, and auto needs 20%",
    OffReason.EXAMPLE_CHANGED: "an example differs from the one that was recorded",
}


@dataclass(frozen=True)
class Off:
    """That the cache is off.

    Attributes:
        reason: why.
        detail: is filled into the reason's sentence; the whole sentence for reasons that have none of their own.
    """

    reason: OffReason
    detail: str = ""

    def __str__(self) -> str:
        return _SENTENCES.get(self.reason, "{}").format(self.detail)


@dataclass
class CachedStage:
    """The cache in one stage.

    Attributes:
        stage: its name.
        epochs: how long it is expected to last.
        cut: where the model is entered; None if it cannot be.
        off: that the cache is off, and why; None while it is on.
        kept: memory or disk; None before that is decided.
        nbytes: bytes that the stores take.
        gain: expected speedup over training without the cache, recording included, of all stages that use it together.
        is_shared: whether other stages use the cache too.
        operations: floating-point operations of the frozen part on the sample.
        full: seconds of a training step without the cache, on the sample.
        top: seconds of a training step with the cache, on the sample.
        recording: seconds of recording, on the sample.
        unneeded: inputs that the trainable part does not read, and the form that they may have instead.
        stores: by source, what was recorded.
        verified: sources of which a batch was computed both ways.
        step_gain: speedup of a batch that was computed both ways.
        error: largest difference of its logits, relative to the largest logit.
        record_seconds: seconds of recording.
        step_seconds: seconds of the replayed training steps that were timed.
        timed_positions: token positions of these.
        full_per_position: seconds per token position without the cache.
        positions: token positions that were replayed in training.
        steps: micro-batches that were replayed in training.
        reported: whether the user was told that the cache is off.
    """

    stage: str
    epochs: float
    cut: Cut | None = None
    off: Off | None = None
    kept: Place | None = None
    nbytes: int = 0
    gain: float | None = None
    is_shared: bool = False
    operations: int = 0
    full: float = 0.0
    top: float = 0.0
    recording: float = 0.0
    unneeded: dict[str, Form] = field(default_factory=dict)
    stores: dict[str, Store] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    step_gain: float | None = None
    error: float | None = None
    record_seconds: float = 0.0
    step_seconds: float = 0.0
    timed_positions: int = 0
    full_per_position: float = 0.0
    positions: int = 0
    steps: int = 0
    reported: bool = False

    @property
    def why(self) -> str:
        """Why the cache is off, as part of a sentence; empty while it is on."""
        return "" if self.off is None else str(self.off)

    @property
    def store(self) -> Store | None:
        """What was recorded of the training examples."""
        return self.stores.get(TRAINING)

    def turn_off(self, reason: OffReason, detail: str = "") -> None:
        """Turn the cache off, unless it is off already: the first reason is kept."""
        if self.off is None:
            self.off = Off(reason, detail)

    def note_trial(self, cut: Cut, full: float, top: float, error: float) -> None:
        """Keep what a batch showed that was computed both ways; see the attributes of these names."""
        self.cut, self.full, self.top, self.error = cut, full, top, error
        self.step_gain = full / max(top, 1e-9)

    def begin(self) -> None:
        """The stage begins: nothing is verified or measured yet."""
        self.verified.clear()
        self.step_seconds, self.timed_positions, self.positions, self.steps = 0.0, 0, 0, 0

    @contextlib.contextmanager
    def timing(self, positions: int | None, device: torch.device) -> Iterator[None]:
        """Within the context, a micro-batch is replayed: count its token positions, and time some of those.

        Args:
            positions: None for one of an evaluation, which does not count.
            device: on which it is computed.
        """
        is_timed = positions is not None and (device.type == "cpu" or self.steps % _TIMED == 0)
        if is_timed:
            _wait(device)
        began = time.perf_counter()
        yield
        if positions is None:
            return
        if is_timed:
            _wait(device)
            self.step_seconds += time.perf_counter() - began
            self.timed_positions += positions
        self.positions += positions
        self.steps += 1

    def close(self) -> None:
        """Release the stores."""
        while self.stores:
            self.stores.popitem()[1].close()

    @property
    def measured_gain(self) -> float | None:
        """Speedup so far, recording included: by the time that a position took without the cache."""
        if not self.timed_positions:
            return None
        seconds = self.step_seconds * self.positions / self.timed_positions
        return self.full_per_position * self.positions / max(seconds + self.record_seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        if self.off is not None or self.cut is None:
            return {"kept": "off", "why": self.why}
        return {
            "kept": str(self.kept),
            "at": self.cut.where,
            "bytes": self.nbytes,
            "record_seconds": self.record_seconds,
            "expected_gain": self.gain,
            "step_gain": self.step_gain,
            "measured_gain": self.measured_gain,
            "largest_difference": self.error,
        }

    def line(self, dtype: str) -> str:
        """For display; `dtype` is `boundary_cache_dtype`."""
        if self.off is not None:
            return f"off: {self.why}"
        assert self.cut is not None
        error = ""
        if self.error is not None and dtype != "auto":
            error = f"; in {dtype} the logits differ by up to {self.error:.1e} of the largest"
        return (
            f"keeps the output of {self.cut.where} {self._where}, {format_bytes(self.nbytes)}{self._expectation}{error}"
        )

    @property
    def _expectation(self) -> str:
        """The expected speedup, as part of a sentence."""
        if self.gain is None:
            return ""
        if self.gain < _NOTICEABLE:
            return ", hardly faster by the times of a few examples"
        return f", about {self.gain:.1f}x faster" + (" over all stages that use it" if self.is_shared else "")

    @property
    def _where(self) -> str:
        return "on disk" if self.kept is Place.DISK else "in memory"


def _wait(device: torch.device) -> None:
    """Wait for an accelerator, so that a time is that of the work and not of its being asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def format_bytes(nbytes: float) -> str:
    """In B, KB, MB or GB (powers of 1000)."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"
