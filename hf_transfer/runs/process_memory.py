"""Memory of this process, as Linux counts it: what is resident, and the most that an action makes resident besides.

An allocator keeps what was freed, and what it kept is used again unseen: the free blocks are given back to the system
first, as far as the C library can.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESETS_PEAK = "5"  # man 5 proc_pid_clear_refs


@dataclass(frozen=True)
class Taken:
    """What an action took of this process's memory, in bytes beyond those before.

    Attributes:
        most: resident during the action.
        kept: resident after it: blocks that are free, and that the C library keeps for itself.
    """

    most: int
    kept: int


def resident() -> int | None:
    """Bytes of this process in memory, without blocks that are free; None where the system does not say."""
    _give_back()
    return _read("VmRSS")


def taken_by(action: Callable[[], Any]) -> Taken | None:
    """What an action takes; None, without it, where the system does not say."""
    before = resident()
    if before is None:
        return None
    try:
        RESET.write_text(_RESETS_PEAK)
    except OSError:
        return None
    action()
    most, after = _read("VmHWM"), _read("VmRSS")
    return None if most is None or after is None else Taken(max(0, most - before), max(0, after - before))


def _read(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _give_back() -> None:
    """Return free blocks to the system, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
