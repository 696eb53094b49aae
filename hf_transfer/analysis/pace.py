"""How long a run trains on this machine, from timed steps, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# The first step of MiniLM under torch.compile took 62 s of CPU time without a cache; torch's inductor compiles in as
# many processes as there are cores. A stage that trains other parameters is compiled again.
LEAST_COMPILATION = 20.0  # seconds for a model of a few layers; large ones take minutes
BEST_GAIN = 2.0  # times: what compiled steps are quicker by, at best
_BYTES = {"memory": "memory_bytes", "kept": "kept_bytes"}
COMPILE_ANYWAY = (
    "Leave torch_compile out, or name a backend as well (torch_compile_backend: inductor) to compile anyway."
)


@dataclass(frozen=True)
class StagePace:
    """The steps of a stage.

    Attributes:
        stage: its name.
        steps: optimizer steps.
        seconds_per_step: of an optimizer step, with loading.
        measured: batches that were timed.
        memory: bytes that a step on the largest batch takes of the process's memory: gradients, activations, their
            gradients and workspaces, without the model and the optimizer's states; None where that is not known.
        kept: bytes of these that the C library keeps for itself after the step; None likewise.
    """

    stage: str
    steps: int
    seconds_per_step: float
    measured: int
    memory: int | None = None
    kept: int | None = None


@dataclass(frozen=True)
class Pace:
    """Training steps on this machine; evaluation and saving are not in them.

    Attributes:
        device: type of the device.
        threads: of torch on the CPU.
        stages: in order.
        resident: bytes of the process's memory before the first step; None where that is not known.
        free: bytes of the machine's memory that training may take besides; None likewise.
    """

    device: str
    threads: int
    stages: tuple[StagePace, ...]
    resident: int | None = None
    free: int | None = None

    @property
    def seconds(self) -> float:
        return sum(stage.steps * stage.seconds_per_step for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "threads": self.threads,
            "seconds": self.seconds,
            "resident_bytes": self.resident,
            "free_bytes": self.free,
            "stages": [_to_dict(stage) for stage in self.stages],
        }

    def line(self) -> str:
        """For display."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        where = f"{self.device}, {threads}" if self.device == "cpu" else self.device
        by_stage = ", ".join(f"{one.stage} {one.steps:,} x {one.seconds_per_step:.3g} s" for one in self.stages)
        batches = sum(one.measured for one in self.stages)
        return (
            f"On this machine ({where}): about {in_time(self.seconds)} of training steps ({by_stage}; {batches} "
            f"batches timed). Evaluation and saving are not in it."
        )


def _to_dict(stage: StagePace) -> dict[str, Any]:
    return {_BYTES.get(name, name): value for name, value in asdict(stage).items()}


def in_time(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    for unit, size in (("s", 1.0), ("min", 60.0)):
        if seconds / size < 90:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 3600:.1f} h"


def compile_note(pace: Pace) -> str:
    """Why `torch_compile` cannot pay back; empty if it may."""
    stages = len(pace.stages)
    saved, cost = pace.seconds * (1 - 1 / BEST_GAIN), stages * LEAST_COMPILATION
    if saved >= cost:
        return ""
    each = f" for each of {stages} stages" if stages > 1 else ""
    return (
        f"torch_compile cannot pay back: the run takes about {in_time(pace.seconds)} of training steps without it, of "
        f"which it would save {in_time(saved)} at the very best ({BEST_GAIN:g} times quicker), and compiling takes "
        f"{LEAST_COMPILATION:.0f} s or more{each}, unless torch's cache has it."
    )
