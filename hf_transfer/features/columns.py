"""Vectors of examples, found by the content of the example: a store whose rows do not belong to one dataset.

A column holds one vector per example, for example the mean over the tokens after a layer. It is kept in *segments*,
each a `Store` whose rows also hold the digest of their example. Where one example of a dataset changed, the vectors of
the others are found; new ones go to rows that are free (after an interrupted run) or to a new segment.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hf_transfer.features import budget as budgets
from hf_transfer.features.ranks import Ranks
from hf_transfer.features.slots import Slot, nbytes
from hf_transfer.features.store import Store
from hf_transfer.features.store_files import NoRoom

DIGEST, VECTOR = "digest", "vector"
_DIGEST_BYTES = 16
_LEAST_ROWS = 64  # of a segment on disk, so that single changed examples do not fill the folder with files

Row = tuple[int, int]  # (number of the segment, row in it)


class FeatureStore:
    """Where features are kept between calls: in this object's memory, or on disk, where they outlive the process.

    On disk the least recently used features are removed once `budget` is exceeded. Several processes may use the same
    folder at once, and one that is killed leaves what it computed.

    Args:
        folder: on disk; None for memory.
        budget: GB that the features may take; by default half of what is free, memory or disk.
    """

    def __init__(self, folder: str | Path | None = None, budget: float | None = None):
        self.folder = None if folder is None else Path(folder)
        self.budget = budget
        self._in_memory: dict[str, list[Store]] = {}

    def segments(self, key: str, slots: Sequence[Slot]) -> list[tuple[str, int, Store | None]]:
        """(name, rows, store if it is in memory) of each segment of a column."""
        if self.folder is None:
            return [("", store.rows, store) for store in self._in_memory.get(key, [])]
        names = sorted(path.name for path in self.folder.glob(f"{key}-*") if path.is_dir())
        return [(name, int(name.rpartition("-")[2]), None) for name in names]

    def open(self, name: str, rows: int, slots: Sequence[Slot], main: bool = True) -> Store:
        """A segment on disk; it is created if it does not exist.

        Raises:
            NoRoom: it does not fit.
        """
        assert self.folder is not None
        place = budgets.entry(self.folder, name)
        if main and not place.exists():
            most = budgets.disk_budget(self.folder) if self.budget is None else self.budget * 1e9
            budgets.make_room(self.folder, nbytes(slots, None, rows), most, place)
        return Store(slots, None, rows, place, main=main)

    def new(self, key: str, rows: int, slots: Sequence[Slot]) -> tuple[str, int, Store]:
        """(name, rows, store) of a new segment with at least so many rows.

        Raises:
            NoRoom: it does not fit.
        """
        if self.folder is not None:
            rows = max(rows, _LEAST_ROWS)
            name = f"{key}-{uuid.uuid4().hex}-{rows}"
            return name, rows, self.open(name, rows, slots)
        taken = sum(store.nbytes for stores in self._in_memory.values() for store in stores)
        needed = nbytes(slots, None, rows)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = budgets.memory_budget(processes) if self.budget is None else self.budget * 1e9 - taken
        if needed > free:
            raise NoRoom(f"{needed / 1e9:.2f} GB of memory are needed, and {max(free, 0) / 1e9:.2f} GB may be used")
        store = Store(slots, None, rows)
        self._in_memory.setdefault(key, []).append(store)
        return "", rows, store


class Column:
    """One vector per example.

    Args:
        store: where it is kept.
        key: of everything that the vectors depend on besides the example.
        width: of the vectors.
        digests: of the wanted examples, without duplicates.
        ranks: the processes that share the pass. All of them must create the column.

    Attributes:
        todo: digests whose vectors are missing.

    Raises:
        NoRoom: the vectors do not fit.
    """

    def __init__(self, store: FeatureStore, key: str, width: int, digests: Sequence[bytes], ranks: Ranks):
        self._store, self._key, self._ranks = store, key, ranks
        self._slots = [
            Slot(DIGEST, (_DIGEST_BYTES,), torch.uint8, False, torch.uint8),
            Slot(VECTOR, (width,), torch.float32, False, torch.float32),
        ]
        self._segments: list[Store] = []
        self._names: list[tuple[str, int]] = []
        self._rows: dict[bytes, Row] = {}
        self._recording = contextlib.ExitStack()
        self.todo: dict[bytes, Row] = {}
        failure = ""
        if store.folder is None or ranks.local_rank == 0:
            try:
                self._find(digests)
            except NoRoom as error:
                failure = str(error)
        if failure := next((reason for reason in ranks.gather(failure) if reason), ""):
            self.close()
            raise NoRoom(failure)
        if store.folder is not None and ranks.world > 1:
            names, todo = ranks.from_local_main((self._names, self.todo))
            if ranks.local_rank:
                self._segments = [store.open(name, rows, self._slots, main=False) for name, rows in names]
                self._index(digests)
                self.todo = todo
        self._rows |= self.todo

    def _find(self, digests: Sequence[bytes]) -> None:
        """Open the segments, and give each missing example a row."""
        for name, rows, segment in self._store.segments(self._key, self._slots):
            with contextlib.suppress(NoRoom):  # it was just removed
                self._segments.append(self._store.open(name, rows, self._slots) if segment is None else segment)
                self._names.append((name, rows))
        self._index(digests)
        missing = [digest for digest in digests if digest not in self._rows]
        free = self._free() if missing else []
        if len(missing) > len(free):
            name, rows, segment = self._store.new(self._key, len(missing) - len(free), self._slots)
            self._segments.append(segment)
            self._names.append((name, rows))
            self._recording.enter_context(segment.lock_recording())
            free += [(len(self._segments) - 1, row) for row in range(rows)]
        self.todo = dict(zip(missing, free, strict=False))

    def _index(self, digests: Sequence[bytes]) -> None:
        """Find the rows of the wanted examples."""
        wanted = set(digests)
        for i, segment in enumerate(self._segments):
            done = sorted(set(range(segment.rows)) - set(segment.missing()))
            kept = segment.get(done, DIGEST).numpy()
            for row, digest in zip(done, map(bytes, kept), strict=True):
                if digest in wanted:
                    self._rows[digest] = (i, row)

    def _free(self) -> list[Row]:
        """Rows that nobody has written, in segments that no other run is writing to."""
        free: list[Row] = []
        for i, segment in enumerate(self._segments):
            is_alone = self._recording.enter_context(segment.lock_recording()) if segment.missing() else False
            free += [(i, row) for row in segment.missing()] if is_alone else []
        return free

    def put(self, digests: Sequence[bytes], vectors: torch.Tensor) -> None:
        """Store those of the vectors, (examples, width), that are missing."""
        by_segment: dict[int, list[tuple[int, int]]] = {}
        for n, digest in enumerate(digests):
            if digest in self.todo:
                segment, row = self.todo[digest]
                by_segment.setdefault(segment, []).append((row, n))
        for segment, pairs in by_segment.items():
            rows, numbers = [row for row, _ in pairs], [n for _, n in pairs]
            kept = np.frombuffer(b"".join(digests[n] for n in numbers), np.uint8).reshape(-1, _DIGEST_BYTES).copy()
            self._segments[segment].put(rows, DIGEST, torch.from_numpy(kept))
            self._segments[segment].put(rows, VECTOR, vectors[numbers].cpu())
            self._segments[segment].mark(rows)

    def finish(self, device: torch.device) -> None:
        """Share what the ranks put, and make it outlive the process; all ranks must call it.

        Args:
            device: that the process group communicates from.
        """
        for segment in sorted({i for i, _ in self.todo.values()}):
            self._segments[segment].flush()
            self._segments[segment].share(device)
        self._ranks.gather(None)  # all have written
        self._recording.close()

    def get(self, digests: Sequence[bytes]) -> torch.Tensor:
        """(examples, width)."""
        found = torch.empty(len(digests), *self._slots[1].shape)
        by_segment: dict[int, list[tuple[int, int]]] = {}
        for n, digest in enumerate(digests):
            segment, row = self._rows[digest]
            by_segment.setdefault(segment, []).append((row, n))
        for segment, pairs in by_segment.items():
            found[[n for _, n in pairs]] = self._segments[segment].get([row for row, _ in pairs], VECTOR)
        return found

    def close(self) -> None:
        """Let other processes remove the files."""
        self._recording.close()
        if self._store.folder is not None:
            for segment in self._segments:
                segment.close()
