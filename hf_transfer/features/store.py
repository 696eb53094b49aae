"""Rows of tensors, one row per training example, in memory or in files that several processes share.

Stores on disk outlive the run. A row counts as complete only once it is marked, after it was written: a run that is
killed leaves complete rows and missing ones, never partial rows that count. A machine that loses power may lose pages
that were written and marked, so a mark also says whether its row has been flushed; one that has not counts only until
the next boot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from hf_transfer.errors import UserError, one_line
from hf_transfer.features import store_files
from hf_transfer.features.slots import Slot, nbytes
from hf_transfer.features.store_files import DONE, MANIFEST, RECORDING, NoRoom

FORMAT = 1
_MISSING, _WRITTEN, _FLUSHED = 0, 1, 2  # a row's byte in the file `done`
_FLUSH_EVERY = 256 * 2**20  # bytes marked
_CHUNK = 64 * 2**20  # bytes sent at once
_WORD = 8  # bytes; buffers are padded to whole words, which are summed as integers


class Store:
    """Tensors of `rows` examples.

    Args:
        slots: what every example has.
        lengths: of each example, if a slot is ragged.
        rows: number of examples.
        folder: of the files; None keeps everything in memory. A store with the same slots and lengths that is already
            there is continued; anything else there is discarded.
        pin: page-lock the memory, for asynchronous copies to a GPU.
        main: whether this process creates the files. The other processes of a machine pass False, once the main one
            has opened the store.

    Raises:
        NoRoom: there is not enough memory or disk space, the folder cannot be used, or another run is creating it.
        ValueError: the number of lengths is not `rows`.
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
            raise ValueError(f"{len(lengths)} lengths for {rows} rows")
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
            buffers = self._open_files(folder, main)
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
            raise NoRoom(f"cannot allocate {size / 2**30:.1f} GiB of memory ({one_line(error, 100)})") from error

    # ---- rows ----

    def put(self, row: int | Sequence[int], slot: str, value: Any) -> None:
        """Store the tensor of one example or of several.

        Args:
            row: the example's row, or rows.
            slot: name of the slot.
            value: of one example, (length, *shape) or (*shape); of several, a list of these or, if the slot is not
                ragged, a tensor of (rows, *shape).

        Raises:
            ValueError: shape or dtype are not the slot's: copying would broadcast and round without a word.
            UserError: a value is out of range for float16.
        """
        kind, tensor = self.slots[slot], self._tensors[slot]
        place: Any
        if not isinstance(row, int | np.integer):
            if kind.ragged or not torch.is_tensor(value):
                for one_row, one_value in zip(row, value, strict=True):
                    self.put(int(one_row), slot, one_value)
                return
            place, shape = torch.as_tensor(row, dtype=torch.int64), (len(row), *kind.shape)
        else:
            place = slice(*self._span(kind, int(row)))
            shape = (place.stop - place.start, *kind.shape)
            value = value if kind.ragged else value[None]
        if tuple(value.shape) != shape or value.dtype != kind.dtype:
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
        overflows = value.isfinite() & ~value.to(torch.float16).isfinite()
        if bool(overflows.any()):
            raise UserError(
                f"boundary_cache_dtype: the largest float16 is {torch.finfo(torch.float16).max:.0f}, and {slot} has "
                f"{float(value[overflows][0]):.3g}.",
                "Use bfloat16 or auto.",
            )

    def get(self, rows: Sequence[int], slot: str) -> Any:
        """The stored tensors, in the dtype that they are kept in.

        Returns:
            For a ragged slot a list of (length, *shape) views, which must not be written to; else a new tensor of
            (rows, *shape).
        """
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
        """Declare that all tensors of these rows are stored. On disk they now outlive the process."""
        rows = [int(row) for row in rows]
        self._done[rows] = _WRITTEN
        if self._maps:
            self._unflushed += rows
            if not store_files.boot_id() or len(self._unflushed) * self._row_bytes >= _FLUSH_EVERY:
                self.flush()

    def missing(self) -> list[int]:
        """Rows that are not marked: in memory by this process, on disk by any process of this machine."""
        return np.flatnonzero(self._done == _MISSING).tolist()

    def flush(self) -> None:
        """Write what this process marked to the disk, the rows before their marks.

        Raises:
            NoRoom: it cannot be written.
        """
        if not self._unflushed:
            return
        rows, self._unflushed = self._unflushed, []
        try:
            for mapped in self._maps[:-1]:
                mapped.flush()
            self._done[rows] = _FLUSHED
            self._maps[-1].flush()
        except OSError as error:
            raise NoRoom(f"{self.folder} cannot be written to ({one_line(error)})") from error

    def share(self, device: torch.device | str = "cpu") -> None:
        """Give all ranks the rows that any of them marked, if each keeps its own in memory. All ranks must call it.

        Each row comes from the first rank that has it. The other ranks' bytes count as zero and all are summed as
        integers, so that the stored values arrive bit for bit, -0.0 and NaN included.

        Args:
            device: that the process group communicates from.
        """
        if self.folder is not None or not dist.is_initialized():
            return
        rank, nobody = dist.get_rank(), dist.get_world_size()
        owner = torch.from_numpy(np.where(self._done != _MISSING, rank, nobody)).to(device, torch.int32)
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
        self._done[owners != nobody] = _WRITTEN

    def discard(self) -> None:
        """Close, and remove the files if rows are missing and no other process uses them."""
        has_gaps, self._unflushed = hasattr(self, "_done") and bool(self.missing()), []
        if self.folder is not None and has_gaps and self._locks and store_files.lock(self._locks[0], exclusive=True):
            with contextlib.suppress(OSError):
                store_files.remove(self.folder)
        self.close()

    def close(self) -> None:
        """Flush, and let other processes remove the files. Tensors that were returned stay valid."""
        if hasattr(self, "_done"):
            self.flush()
        self._tensors, self._words, self._maps = {}, {}, []
        while self._locks:
            self._locks.pop().close()

    # ---- files ----

    def _files(self) -> dict[str, int]:
        """{file: bytes}, the file `done` last."""
        sizes = [_padded(slot.nbytes(self._lengths, self.rows)) for slot in self.slots.values()]
        return {f"{i}.bin": size for i, size in enumerate(sizes)} | {DONE: _padded(self.rows)}

    def _manifest(self) -> dict[str, Any]:
        slots = [
            [slot.name, list(slot.shape), str(slot.dtype), slot.ragged, str(slot.kept)] for slot in self.slots.values()
        ]
        lengths = hashlib.blake2b(json.dumps(self._lengths).encode(), digest_size=16).hexdigest()
        return {"format": FORMAT, "slots": slots, "rows": self.rows, "lengths": lengths}

    def _open_files(self, folder: Path, main: bool) -> list[torch.Tensor]:
        """The mapped files, in the order of `_files`."""
        try:
            self._open(folder, main)
            return [self._map(folder / name, size) for name, size in self._files().items()]
        except OSError as error:
            self.close()
            raise NoRoom(f"{folder} cannot be used ({one_line(error)})") from error
        except NoRoom:
            self.close()
            raise

    def _open(self, folder: Path, main: bool) -> None:
        self._locks.append(store_files.enter(folder))
        if not main:
            if not self._is_complete(folder):
                raise NoRoom(f"{folder} holds another store")
            return
        with self.lock_recording() as alone:
            if self._is_complete(folder):
                os.utime(folder / MANIFEST)
                if alone:
                    self._discard_unflushed(folder)
            elif alone:
                self._create(folder)
            else:
                raise NoRoom(f"another run is creating {folder}")

    def _is_complete(self, folder: Path) -> bool:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in self._files()}
        except (OSError, ValueError):
            return False
        boot = manifest.pop("boot", None) if isinstance(manifest, dict) else None
        return boot is not None and manifest == self._manifest() and sizes == self._files()

    def _create(self, folder: Path) -> None:
        old = [folder / MANIFEST, *folder.glob("*.bin"), folder / DONE]
        try:
            for path in old:  # the manifest first
                path.unlink(missing_ok=True)
            for name, size in self._files().items():
                store_files.reserve(folder / name, size)
            self._write_manifest(folder)
        except BaseException:
            for path in (folder / MANIFEST, *(folder / name for name in self._files())):
                path.unlink(missing_ok=True)
            if store_files.lock(self._locks[0], exclusive=True):
                store_files.remove(folder)
            raise

    def _write_manifest(self, folder: Path) -> None:
        temporary = folder / f"{MANIFEST}.{os.getpid()}"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self._manifest() | {"boot": store_files.boot_id()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / MANIFEST)

    def _discard_unflushed(self, folder: Path) -> None:
        """Clear the marks of rows that had not been flushed when the machine was last booted."""
        if json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["boot"] == store_files.boot_id() != "":
            return
        with (folder / DONE).open("r+b") as file:
            done = np.frombuffer(file.read(), np.uint8)
            file.seek(0)
            file.write(np.where(done == _FLUSHED, done, _MISSING).astype(np.uint8).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._write_manifest(folder)

    def _map(self, path: Path, size: int) -> torch.Tensor:
        with path.open("r+b") as file:
            self._maps.append(mmap.mmap(file.fileno(), size))
        return torch.frombuffer(self._maps[-1], dtype=torch.uint8)

    @contextlib.contextmanager
    def lock_recording(self) -> Iterator[bool]:
        """Whether only this run may write within the context; always True in memory."""
        if self.folder is None:
            yield True
            return
        with (self.folder / RECORDING).open("ab") as file:
            yield store_files.lock(file, exclusive=True)


def _padded(size: int) -> int:
    """Rounded up to whole words; at least one, since an empty file cannot be mapped."""
    return max(-(-size // _WORD), 1) * _WORD


def _runs(flags: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """(first, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
