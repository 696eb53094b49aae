"""One pass over the examples of a run that stores what crosses the boundaries of several stages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hf_transfer.features import digests, replay, store
from hf_transfer.features.examples import (
    NUMBERS,
    Numbered,
    NumberedCollator,
    Rows,
    Source,
    batches_by_length,
    content_of,
    unpadded,
)
from hf_transfer.features.replay import Batch, Cut, Refused
from hf_transfer.features.store import NoRoom, Slot, Store
from hf_transfer.training.running import RunningTrainer
from hf_transfer.training.trial import KEPT, Form

BESIDE = "batch/"  # before the names of what is stored beside what crosses the boundary
CONTENT = "content"


@dataclass
class Shelf:
    """What is kept of the examples for one stage.

    Attributes:
        cut: where the model is entered.
        kept: memory or disk.
        below: names of the parameters below the boundary.
        stores: by name of the source.
    """

    cut: Cut
    kept: str
    below: tuple[str, ...]
    stores: dict[str, Store] = field(default_factory=dict)


def slots_of(cut: Cut, beside: dict[str, Form], dtype: str) -> list[Slot]:
    """What a store holds of an example.

    Args:
        cut: its tensors.
        beside: what is stored of the batch itself.
        dtype: `boundary_cache_dtype`.
    """
    kept = KEPT.get(dtype)
    crossing = [
        Slot(
            name,
            leaf.shape,
            leaf.dtype,
            leaf.ragged,
            kept if kept is not None and leaf.dtype.is_floating_point else leaf.dtype,
        )
        for name, (_, _, leaf) in cut.stored.items()
    ]
    return crossing + [Slot(BESIDE + name, shape, dtype, False, dtype) for name, (shape, dtype) in beside.items()]


def folder_of(trainer: RunningTrainer) -> Path:
    """Where stores on disk are."""
    wanted = trainer.args.boundary_cache_dir
    return store.default_folder() if wanted is None else Path(wanted)


def record(
    trainer: RunningTrainer, shelves: Sequence[Shelf], sources: Sequence[Source], beside: dict[str, Form]
) -> str:
    """Fill shelves; called by all processes.

    Args:
        trainer: with its model, in eval mode afterwards.
        shelves: of the stages.
        sources: of examples.
        beside: what is stored of the batches themselves.

    Returns:
        Why it could not be done; empty where it was.
    """
    recording = _Recording(trainer, shelves, beside)
    for source in sources:
        for work in (recording.allocate, recording.fill):
            why = ""
            try:
                work(source)
            except (Refused, NoRoom) as refusal:
                why = str(refusal)
            if why := recording.any_rank(why):
                return why
    for shelf in shelves:
        for kept in shelf.stores.values():
            kept.share(trainer.args.device)
    return ""


class _Recording:
    def __init__(self, trainer: RunningTrainer, shelves: Sequence[Shelf], beside: dict[str, Form]):
        self.trainer, self.shelves, self.beside = trainer, shelves, beside
        self.args = trainer.args

    def any_rank(self, why: str) -> str:
        """The first reason that any process has."""
        if self.args.world_size == 1:
            return why
        return next((reason for reason in gather_object([why]) if reason), "")

    def allocate(self, source: Source) -> None:
        main, folder = self.args.local_process_index == 0, folder_of(self.trainer)
        for shelf in self.shelves:
            slots, rows, failed = slots_of(shelf.cut, self.beside, self.args.boundary_cache_dtype), source.num_rows, ""
            if shelf.kept == "memory":
                pin = self.args.device.type == "cuda"
                shelf.stores[source.name] = Store(slots, source.lengths, rows, pin=pin)
                continue
            budget = self.args.boundary_cache_budget
            place = store.entry(folder, self._key(shelf, source))
            if main:
                try:
                    most = store.disk_budget(folder) if budget is None else int(budget * 1e9)
                    store.make_room(folder, store.nbytes(slots, source.lengths, rows), most, place)
                    shelf.stores[source.name] = Store(slots, source.lengths, rows, place)
                except NoRoom as refusal:
                    failed = str(refusal)
            if reason := self.any_rank(failed):
                raise NoRoom(reason)
            if not main:
                shelf.stores[source.name] = Store(slots, source.lengths, rows, place, main=False)

    def _key(self, shelf: Shelf, source: Source) -> str:
        """Names everything that what is kept depends on.

        Raises:
            NoRoom: something of it cannot be told from something else.
        """
        model = self.trainer.model
        parts = {
            "the examples": digests.dataset_digest(source.dataset),
            "the model's code": digests.code_digest(model),
            "the collator": digests.collator_digest(source.collate),
        }
        for what, digest in parts.items():
            if digest is None:
                raise NoRoom(f"a change of {what} could not be told, so nothing is kept on disk; use memory")
        buffers = [name for name, _ in model.named_buffers()]
        precision = (self.trainer.accelerator.mixed_precision, self.args.boundary_cache_dtype, self.args.device.type)
        return digests.key(
            {name: str(digest) for name, digest in parts.items()}
            | {
                "weights": digests.weights_digest(model, [*shelf.below, *buffers]),
                "views": str(source.num_views),
                "boundary": repr(sorted(shelf.cut.stored)),
                "batches": repr((self._batch_size, *precision, torch.get_float32_matmul_precision())),
            }
        )

    def fill(self, source: Source) -> None:
        """One pass over the examples of this process that are missing, of one length together."""
        stores = [shelf.stores[source.name] for shelf in self.shelves]
        missing = set[int]().union(*(kept.missing() for kept in stores))
        # A disk may be that of one machine: there each machine records all.
        rank, world = self.args.process_index, self.args.world_size
        if any(shelf.kept == "disk" for shelf in self.shelves):
            rank, world = self.args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        batches = batches_by_length(len(source.dataset), source.lengths, self._batch_size)
        own, views = batches[rank::world], source.num_views
        with contextlib.ExitStack() as stack:
            for kept in stores if self.args.local_process_index == 0 else ():
                if not stack.enter_context(kept.lock_recording()):
                    raise NoRoom("another run is just recording the same")
            for view in range(views):
                todo = [b for b in own if any(number * views + view in missing for number in b)]
                with contextlib.nullcontext() if source.views is None else source.views.fixed(view):
                    self._fill_view(source, todo, views, view)
        for kept in stores:
            kept.flush()

    @property
    def _batch_size(self) -> int:
        """Without gradients a batch takes less memory than in training."""
        return max(self.args.eval_batch_size, self.args.train_batch_size)

    def _fill_view(self, source: Source, todo: list[list[int]], views: int, view: int) -> None:
        loader = DataLoader(
            Numbered(source.dataset, Rows()),
            batch_sampler=todo,
            collate_fn=NumberedCollator(source.collate, Rows()),
            num_workers=self.args.dataloader_num_workers,
        )
        cuts = [shelf.cut for shelf in self.shelves]
        for loaded in loader:
            numbers = loaded.pop(NUMBERS)
            batch = dict(self.trainer._prepare_inputs(loaded))
            self.trainer.model.eval()
            with self.trainer.accelerator.autocast():
                found = replay.record(self.trainer.model, cuts, batch)
            rows = [number * views + view for number in numbers]
            for shelf, tensors in zip(self.shelves, found, strict=True):
                kept = shelf.stores[source.name]
                for name, (_, _, leaf) in shelf.cut.stored.items():
                    value = tensors[name].cpu()
                    if leaf.ragged:
                        kept.put(rows, name, unpadded(value, replay.positions_of(batch), numbers, source.lengths))
                    else:
                        kept.put(rows, name, value)
                for name, values in self._beside(batch).items():
                    kept.put(rows, BESIDE + name, values)
                kept.mark(rows)

    def _beside(self, batch: Batch) -> Batch:
        """What is stored of the batch itself.

        Raises:
            Refused: it is not there: held-out examples may have no labels.
        """
        content = content_of(batch)
        known = {**batch, CONTENT: content}
        if absent := [name for name in self.beside if known.get(name) is None]:
            raise Refused(f"some examples have no {absent[0]}")
        return {name: known[name].cpu() for name in self.beside}
