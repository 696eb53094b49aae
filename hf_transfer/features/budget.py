"""How much memory and disk stores may take, and the folder that holds those on disk."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import psutil

from hf_transfer.features.store_files import LOCK, MANIFEST, REMOVED, NoRoom, is_at, lock, remove


def default_folder() -> Path:
    """The folder of all stores on disk, in the Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_transfer" / "boundary"


def entry(folder: Path, key: str) -> Path:
    """The folder of one store."""
    return folder / key


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if (path / LOCK).exists()] if folder.is_dir() else []


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _last_used(folder: Path) -> float:
    """Time of the last opening; 0 for a store that was never completed."""
    try:
        return (folder / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def make_room(folder: Path, needed: int, budget: float, own: Path | None = None) -> None:
    """Remove the least recently used stores until `needed` more bytes fit the budget.

    Stores in use are kept. If the bytes cannot be made to fit, nothing is removed.

    Args:
        folder: of all stores.
        needed: bytes of the new store.
        budget: bytes of all stores.
        own: folder of the new store; if it exists already it is not counted, and kept.

    Raises:
        NoRoom: the other stores are in use, or the new one exceeds the budget by itself.
    """
    if needed > budget:
        raise NoRoom(f"{needed / 1e9:.3g} GB are needed, and the budget is {max(budget, 0) / 1e9:.3g} GB")
    for leftover in folder.glob(f"{REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    others = sorted((path for path in _entries(folder) if path != own), key=_last_used)
    surplus = sum(map(_size, others)) + needed - budget
    with contextlib.ExitStack() as open_locks:
        to_remove = []
        for path in others:
            if surplus <= 0:
                break
            with contextlib.suppress(OSError):
                file = open_locks.enter_context((path / LOCK).open("ab"))
                if lock(file, exclusive=True) and is_at(file, path / LOCK):
                    to_remove.append(path)
                    surplus -= _size(path)
        if surplus > 0:
            raise NoRoom(f"{needed / 1e9:.3g} GB are needed, and the stores in {folder} are in use")
        for path in to_remove:
            with contextlib.suppress(OSError):
                remove(path)


def disk_budget(folder: Path) -> int:
    """Bytes that all stores in `folder` may take: half of the free disk space, plus what they take now."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free // 2 + sum(map(_size, _entries(folder)))


def memory_budget(processes: int = 1) -> int:
    """Bytes of memory that one of `processes` on this machine may take.

    An equal part of half of the available memory, within the limits of the process's control groups.
    """
    return available_memory() // 2 // processes


def available_memory() -> int:
    """Bytes of memory that are available, within the limits of the process's control groups."""
    return int(min([psutil.virtual_memory().available, *_group_limits()]))


def _group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group (v1 or v2) above this process; reclaimable file cache counts as free."""
    left: list[int] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        innermost = base / path.lstrip("/")
        for group in (innermost, *innermost.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" means no limit
                limit, used = (int((group / name).read_text()) for name in names)
                stat = dict(pair.split() for pair in (group / "memory.stat").read_text().splitlines())
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                left.append(max(limit - used + cached, 0))
            if group == base:
                break
    return left
