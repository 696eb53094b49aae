"""Memory of this process, as Linux counts it: what is resident, and the most that an action makes resident besides.

An allocator keeps what was freed, and what it kept is used again unseen: the free blocks are given back to the system
first, as far as the C library can.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESETS_PEAK = "5"  # man 5 proc_pid_clear_refs


def resident() -> int | None:
    """Bytes of this process in memory, without blocks that are free; None where the system does not say."""
    _give_back()
    return _read("VmRSS")


def peak_of(action: Callable[[], Any]) -> int | None:
    """Most bytes that were resident during an action beyond those before; None, without it, where that is not said."""
    before = resident()
    if before is None:
        return None
    try:
        RESET.write_text(_RESETS_PEAK)
    except OSError:
        return None
    action()
    peak = _read("VmHWM")
    return None if peak is None else max(0, peak - before)


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
