"""Files and locks of stores on disk.

A folder holds one store: a manifest, one file per slot, and one byte per row that says whether the row is complete. A
process that uses the folder holds a shared lock, so that no other one removes it; whoever writes rows holds a second
lock exclusively. Locks end with the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such locks, but a mapped file cannot be removed there
    fcntl = None  # type: ignore[assignment]

MANIFEST, DONE, LOCK, RECORDING = "manifest.json", "done", "lock", "recording"
REMOVED = ".removed-"  # prefix of a folder that is being deleted
_ATTEMPTS = 100  # to enter a folder that another process is removing


class NoRoom(Exception):
    """The store does not fit, or its folder cannot be used; the message is the reason, as part of a sentence."""


def boot_id() -> str:
    """Identifies the time since the machine was booted; empty if the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def reserve(path: Path, size: int) -> None:
    """Create a file of `size` zero bytes whose disk space is allocated.

    Without the allocation, writing to a page of a mapped file on a full disk kills the process.

    Raises:
        OSError: there is not enough disk space.
    """
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"less than {size / 2**30:.1f} GiB are free")
        file.truncate(size)


def lock(file: IO[bytes], exclusive: bool) -> bool:
    """Lock an open file without waiting; whether that succeeded. The lock ends when the file is closed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def enter(folder: Path) -> IO[bytes]:
    """Create a folder if it does not exist, and keep other processes from removing it while the file is open.

    Raises:
        NoRoom: another process is removing it.
    """
    for _ in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            file = (folder / LOCK).open("ab")
            if lock(file, exclusive=False) and is_at(file, folder / LOCK):
                return file
            file.close()
    raise NoRoom(f"{folder} is being removed")


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove(folder: Path) -> None:
    """Delete a folder; for other processes it disappears at once."""
    removed = folder.with_name(f"{REMOVED}{uuid.uuid4().hex}")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
