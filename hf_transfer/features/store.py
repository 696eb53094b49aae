"""Rows of tensors, one row per training example, in memory or in files that several processes share.

What lies on a disk outlives the run. A row counts as whole only once it was marked, which happens after it was
written: a run that is killed leaves whole rows and missing ones, never half ones that count. A machine that loses its
power may lose pages that were written and marked, so a mark says whether its row has been flushed since, and one that
has not counts only until the next boot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from hf_transfer.errors import UserError, one_line

try:
    import fcntl
except ImportError:  # no locks there: a file that is mapped cannot be removed either
    fcntl = None  # type: ignore[assignment]
FORMAT = 1
MANIFEST, DONE, LOCK, RECORDING = "manifest.json", "done", "lock", "recording"
_REMOVED = ".removed-"
_MISSING, _WRITTEN, _FLUSHED = 0, 1, 2  # a row's byte in the file of what is done
_FLUSH_EVERY = 256 * 2**20  # bytes marked
_CHUNK = 64 * 2**20  # bytes sent at once
_WORD = 8  # bytes; buffers are padded to whole ones, to be summed as integers


class NoRoom(Exception):
    """What is to be kept does not fit, or the folder cannot be used."""


@dataclass(frozen=True)
class Slot:
    """A tensor that every example has.

    Attributes:
        name: of the tensor.
        shape: of one example, without the ragged dimension.
        dtype: that it comes in.
        ragged: whether an example has `length` rows of that shape, or is one.
        kept: what it is stored in: `dtype`, or a smaller one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ragged: bool
    kept: torch.dtype

    def tensor_shape(self, lengths: Sequence[int] | None, rows: int) -> tuple[int, ...]:
        """Of all examples together."""
        if self.ragged and lengths is None:
            raise ValueError(f"slot {self.name} is ragged, and there are no lengths")
        return (sum(lengths) if self.ragged and lengths is not None else rows, *self.shape)

    def nbytes(self, lengths: Sequence[int] | None, rows: int) -> int:
        return math.prod(self.tensor_shape(lengths, rows)) * self.kept.itemsize


def nbytes(slots: Sequence[Slot], lengths: Sequence[int] | None, rows: int) -> int:
    """Bytes that a store of these takes."""
    return sum(slot.nbytes(lengths, rows) for slot in slots)


class Store:
    """Tensors of `rows` examples.

    Args:
        slots: what every example has.
        lengths: of each example, where a slot is ragged.
        rows: number of examples.
        folder: where the files are; None keeps all in memory. What is there already, of the same slots and lengths,
            is gone on with; anything else there is discarded.
        pin: page-lock the memory, for copies to a GPU that do not wait.
        main: makes the files. The other processes of a machine open them with False, once the main one is through.

    Raises:
        NoRoom: memory or disk do not suffice, the folder cannot be used, or another run is just making it.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        lengths: Sequence[int] | None,
        rows: int,
        folder: Path | None = None,
        pin: bool = False,
        main: bool = True,
    ):
        if lengths is not None and len(lengths) != rows:
            raise ValueError(f"{len(lengths)} lengths of {rows} rows")
        self.slots, self.rows, self.folder = {slot.name: slot for slot in slots}, rows, folder
        self.nbytes = nbytes(slots, lengths, rows)
        self._lengths = None if lengths is None else [int(n) for n in lengths]
        ends = np.cumsum(self._lengths, dtype=np.int64).tolist() if self._lengths else []
        self._offsets = [0, *ends]
        self._maps: list[mmap.mmap] = []
        self._locks: list[IO[bytes]] = []
        self._unflushed: list[int] = []
        self._row_bytes = self.nbytes / max(rows, 1)
        if folder is None:
            self._done = np.zeros(rows, np.uint8)
            buffers = [self._allocate(slot, pin) for slot in slots]
        else:
            try:
                self._open(folder, main)
                buffers = [self._map(folder / name, size) for name, size in self._files().items()]
            except OSError as error:
                self.close()
                raise NoRoom(f"{folder} cannot be used ({one_line(error)})") from error
            except NoRoom:
                self.close()
                raise
            self._done = buffers.pop().numpy()[:rows]
        self._words = dict(zip(self.slots, buffers, strict=True))
        self._tensors = {
            slot.name: self._words[slot.name][: slot.nbytes(self._lengths, rows)]
            .view(slot.kept)
            .view(slot.tensor_shape(self._lengths, rows))
            for slot in slots
        }

    def _allocate(self, slot: Slot, pin: bool) -> torch.Tensor:
        size = _padded(slot.nbytes(self._lengths, self.rows))
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        except RuntimeError as error:
            raise NoRoom(f"{size / 2**30:.1f} GiB of memory cannot be had ({one_line(error, 100)})") from error

    # ---- rows ----

    def put(self, row: int | Sequence[int], slot: str, value: Any) -> None:
        """Store one example's tensor, (length, *shape) or (*shape); or those of several, as a list of tensors or,
        where the slot is not ragged, one of (rows, *shape)."""
        kind, tensor = self.slots[slot], self._tensors[slot]
        place: Any
        if not isinstance(row, int | np.integer):
            if kind.ragged or not torch.is_tensor(value):
                for one, its in zip(row, value, strict=True):
                    self.put(int(one), slot, its)
                return
            place, shape = torch.as_tensor(row, dtype=torch.int64), (len(row), *kind.shape)
        else:
            place = slice(*self._span(kind, int(row)))
            shape = (place.stop - place.start, *kind.shape)
            value = value if kind.ragged else value[None]
        if tuple(value.shape) != shape or value.dtype != kind.dtype:  # copying would broadcast and round in silence
            raise ValueError(f"slot {slot} wants {shape} of {kind.dtype}, not {tuple(value.shape)} of {value.dtype}")
        value = value.detach()
        if kind.kept != kind.dtype and kind.kept == torch.float16:
            self._check_range(slot, value)
        if isinstance(place, slice):
            tensor[place].copy_(value)
        else:
            tensor[place] = value.to("cpu", kind.kept)

    def _check_range(self, slot: str, value: torch.Tensor) -> None:
        if bool(value.to(torch.float16).isfinite().all()):
            return
        most = torch.finfo(torch.float16).max
        beyond = value.isfinite() & ~value.to(torch.float16).isfinite()
        if bool(beyond.any()):
            raise UserError(
                f"boundary_cache_dtype: float16 holds numbers up to {most:.0f}, and {slot} has "
                f"{float(value[beyond][0]):.3g}.",
                "Take bfloat16 or auto.",
            )

    def get(self, rows: Sequence[int], slot: str) -> Any:
        """What was stored, in the type it is kept in: for a ragged slot a list of (length, *shape) views, which are
        not to be written to, else a new tensor of (rows, *shape)."""
        tensor = self._tensors[slot]
        if not self.slots[slot].ragged:
            return tensor.index_select(0, torch.as_tensor(rows, dtype=torch.int64))
        offsets = self._offsets
        return [tensor[offsets[row] : offsets[row + 1]] for row in rows]

    def _span(self, slot: Slot, row: int) -> tuple[int, int]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        return (self._offsets[row], self._offsets[row + 1]) if slot.ragged else (row, row + 1)

    def mark(self, rows: Sequence[int]) -> None:
        """Say that all tensors of these rows are stored. From now on they outlive this process."""
        rows = [int(row) for row in rows]
        self._done[rows] = _WRITTEN
        if self._maps:
            self._unflushed += rows
            if not _boot() or len(self._unflushed) * self._row_bytes >= _FLUSH_EVERY:
                self.flush()

    def missing(self) -> list[int]:
        """Rows that were not marked: in memory by this process, on a disk by any of this machine."""
        return np.flatnonzero(self._done == _MISSING).tolist()

    def flush(self) -> None:
        """Bring what this process marked to the disk, the rows first."""
        if self._unflushed:
            for mapped in self._maps[:-1]:
                mapped.flush()
            self._done[self._unflushed] = _FLUSHED
            self._maps[-1].flush()
            self._unflushed = []

    def share(self, device: torch.device | str = "cpu") -> None:
        """Give all ranks the rows that any of them marked, where each keeps its own in memory. All must call it.

        Each row is taken from the first rank that has it, the others' count as zeros, and the bytes are summed as
        integers: what was stored arrives by every bit, -0.0 and NaN too.

        Args:
            device: where the process group sends from.
        """
        if self.folder is not None or not dist.is_initialized():
            return
        rank, none = dist.get_rank(), dist.get_world_size()
        owner = torch.from_numpy(np.where(self._done != _MISSING, rank, none)).to(device, torch.int32)
        dist.all_reduce(owner, op=dist.ReduceOp.MIN)
        owners = owner.cpu().numpy()
        for slot in self.slots.values():
            for first, end in _runs(owners != rank):
                self._tensors[slot.name][self._span(slot, first)[0] : self._span(slot, end - 1)[1]].zero_()
            self._words[slot.name][slot.nbytes(self._lengths, self.rows) :].zero_()
            for chunk in self._words[slot.name].view(torch.int64).split(_CHUNK // _WORD):
                sent = chunk.to(device)
                dist.all_reduce(sent)
                if sent.data_ptr() != chunk.data_ptr():
                    chunk.copy_(sent)
        self._done[owners != none] = _WRITTEN

    def close(self) -> None:
        """Flush, and let others remove the files. Tensors that were given out stay valid."""
        if hasattr(self, "_done"):
            self.flush()
        self._tensors, self._words, self._maps = {}, {}, []
        while self._locks:
            self._locks.pop().close()

    # ---- files ----

    def _files(self) -> dict[str, int]:
        """Bytes by file, that of what is done last."""
        sizes = [_padded(slot.nbytes(self._lengths, self.rows)) for slot in self.slots.values()]
        return {f"{i}.bin": size for i, size in enumerate(sizes)} | {DONE: _padded(self.rows)}

    def _manifest(self) -> dict[str, Any]:
        slots = [
            [slot.name, list(slot.shape), str(slot.dtype), slot.ragged, str(slot.kept)] for slot in self.slots.values()
        ]
        lengths = hashlib.blake2b(json.dumps(self._lengths).encode(), digest_size=16).hexdigest()
        return {"format": FORMAT, "slots": slots, "rows": self.rows, "lengths": lengths}

    def _open(self, folder: Path, main: bool) -> None:
        self._locks.append(_enter(folder))
        if not main:
            if not self._is_whole(folder):
                raise NoRoom(f"{folder} holds something else")
            return
        with self.lock_recording() as alone:
            if self._is_whole(folder):
                os.utime(folder / MANIFEST)
                if alone:
                    self._forget_what_a_crash_took(folder)
            elif alone:
                self._make(folder)
            else:
                raise NoRoom(f"another run is making {folder}")

    def _is_whole(self, folder: Path) -> bool:
        try:
            found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in self._files()}
        except (OSError, ValueError):
            return False
        boot = found.pop("boot", None) if isinstance(found, dict) else None
        return boot is not None and found == self._manifest() and sizes == self._files()

    def _make(self, folder: Path) -> None:
        """The files, each with its place on the disk: a page that has none, once the disk is full, kills its writer."""
        old = [folder / MANIFEST, *folder.glob("*.bin"), folder / DONE]
        try:
            for path in old:  # the manifest first
                path.unlink(missing_ok=True)
            for name, size in self._files().items():
                _reserve(folder / name, size)
            self._seal(folder)
        except BaseException:
            for path in (folder / MANIFEST, *(folder / name for name in self._files())):
                path.unlink(missing_ok=True)
            if _lock(self._locks[0], exclusive=True):
                _remove(folder)
            raise

    def _seal(self, folder: Path) -> None:
        beside = folder / f"{MANIFEST}.{os.getpid()}"
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self._manifest() | {"boot": _boot()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(folder / MANIFEST)

    def _forget_what_a_crash_took(self, folder: Path) -> None:
        """Marks of rows that were not flushed before the machine was started anew."""
        if json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["boot"] == _boot() != "":
            return
        with (folder / DONE).open("r+b") as file:
            done = np.frombuffer(file.read(), np.uint8)
            file.seek(0)
            file.write(np.where(done == _FLUSHED, done, _MISSING).astype(np.uint8).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._seal(folder)

    def _map(self, path: Path, size: int) -> torch.Tensor:
        with path.open("r+b") as file:
            self._maps.append(mmap.mmap(file.fileno(), size))
        return torch.frombuffer(self._maps[-1], dtype=torch.uint8)

    @contextlib.contextmanager
    def lock_recording(self) -> Iterator[bool]:
        """Whether this run alone may write within; True in memory."""
        if self.folder is None:
            yield True
            return
        with (self.folder / RECORDING).open("ab") as file:
            yield _lock(file, exclusive=True)


def _padded(size: int) -> int:
    """To whole words, one at least: an empty file cannot be mapped."""
    return max(-(-size // _WORD), 1) * _WORD


def _runs(flags: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """(first, end) of each run of true ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _boot() -> str:
    """Names the time since this machine was started; empty where it cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _reserve(path: Path, size: int) -> None:
    """A file of zeros with its place on the disk.

    Raises:
        OSError: there is not so much.
    """
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"no {size / 2**30:.1f} GiB are free")
        file.truncate(size)


# ---- locks ----


def _lock(file: IO[bytes], exclusive: bool) -> bool:
    """Lock an open file if that needs no waiting. The lock goes with the file, and with the process."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _enter(folder: Path) -> IO[bytes]:
    """Make a folder where there is none, and keep others from removing it while the file is open."""
    for _ in range(100):  # each time another process was just removing it
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            file = (folder / LOCK).open("ab")
            if _lock(file, exclusive=False) and _is_at(file, folder / LOCK):
                return file
            file.close()
    raise NoRoom(f"{folder} is being removed")


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(folder: Path) -> None:
    """At once for the others, whoever looks."""
    gone = folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


# ---- the folder of all that is kept ----


def default_folder() -> Path:
    """In the Hugging Face cache."""
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
    """When it was opened last; 0 for one that was never whole."""
    try:
        return (folder / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def make_room(folder: Path, needed: int, budget: float, own: Path | None = None) -> None:
    """Remove entries, those first that were not used for longest, until `needed` bytes more are within the budget.

    Those in use stay. Where it cannot be done, nothing is removed.

    Args:
        folder: of the entries.
        needed: bytes of the entry to come.
        budget: bytes of all.
        own: the entry to come, which may be there already: it is not counted, and stays.

    Raises:
        NoRoom: the others are in use, or it is too much by itself.
    """
    if needed > budget:
        raise NoRoom(f"{needed / 1e9:.2f} GB are needed, of {max(budget, 0) / 1e9:.2f} GB that may be used")
    for left in folder.glob(f"{_REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)
    others = sorted((path for path in _entries(folder) if path != own), key=_last_used)
    surplus = sum(map(_size, others)) + needed - budget
    with contextlib.ExitStack() as open_locks:
        chosen = []
        for path in others:
            if surplus <= 0:
                break
            with contextlib.suppress(OSError):
                file = open_locks.enter_context((path / LOCK).open("ab"))
                if _lock(file, exclusive=True) and _is_at(file, path / LOCK):
                    chosen.append(path)
                    surplus -= _size(path)
        if surplus > 0:
            raise NoRoom(f"{needed / 1e9:.2f} GB are needed, and what is kept in {folder} is in use")
        for path in chosen:
            with contextlib.suppress(OSError):
                _remove(path)


def disk_budget(folder: Path) -> int:
    """Bytes that all entries may take: half of what is free, and what they take now."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free // 2 + sum(map(_size, _entries(folder)))


def memory_budget(processes: int = 1) -> int:
    """Bytes of memory that one of `processes` on this machine may take: its part of half of what is available, in the
    machine and under the limits of the control groups that it is in."""
    return min([psutil.virtual_memory().available, *_group_limits()]) // 2 // processes


def _group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group above this process leaves, of either version; files that were read do not count."""
    found = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = base / path.lstrip("/")
        for group in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                limit, used = (int((group / name).read_text()) for name in names)
                stat = dict(pair.split() for pair in (group / "memory.stat").read_text().splitlines())
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                found.append(max(limit - used + cached, 0))
            if group == base:
                break
    return found
