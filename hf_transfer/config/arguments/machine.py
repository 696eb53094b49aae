"""The key of the machine that trains."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting


@dataclass
class MachineArguments:
    """What a run takes of its machine."""

    cpu_threads: int | str | None = setting(
        None,
        "threads of torch on the CPU (default: torch's own number); auto: the quickest of a few, by timed steps",
        choices=("auto",),
        above=0,
        resume="fixed",
    )
