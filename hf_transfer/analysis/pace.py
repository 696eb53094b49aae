"""How long a run trains on this machine, from timed steps, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# The first step of MiniLM under torch.compile took 62 s of CPU time without a cache; torch's inductor compiles in as
# many processes as there are cores. A stage that trains other parameters is compiled again.
LEAST_COMPILATION = 20.0  # seconds for a model of a few layers; large ones take minutes
BEST_GAIN = 2.0  # times: what compiled steps are quicker by, at best


@dataclass(frozen=True)
class StagePace:
    """The steps of a stage.

    Attributes:
        stage: its name.
        steps: optimizer steps.
        seconds_per_step: of an optimizer step, with loading.
        measured: batches that were timed.
    """

    stage: str
    steps: int
    seconds_per_step: float
    measured: int


@dataclass(frozen=True)
class Pace:
    """Training steps on this machine; evaluation and saving are not in them.

    Attributes:
        device: type of the device.
        threads: of torch on the CPU.
        stages: in order.
    """

    device: str
    threads: int
    stages: tuple[StagePace, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.steps * stage.seconds_per_step for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "threads": self.threads,
            "seconds": self.seconds,
            "stages": [asdict(stage) for stage in self.stages],
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
        f"{LEAST_COMPILATION:.0f} s or more{each}, unless torch's cache has it. Leave it out."
    )
