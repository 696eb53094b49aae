"""One pass over the examples of a run that stores the outputs at the boundaries of several stages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hf_transfer.errors import UserError, one_line
from hf_transfer.features import budget, digests, replay
from hf_transfer.features.batches import Batch, positions_of
from hf_transfer.features.cut import Cut, Refused
from hf_transfer.features.examples import (
    NUMBERS,
    Numbered,
    NumberedCollator,
    Source,
    StoredInputs,
    batches_by_length,
    content_of,
    unpadded,
)
from hf_transfer.features.object_digests import collator_digest
from hf_transfer.features.slots import Slot, nbytes
from hf_transfer.features.store import Store
from hf_transfer.features.store_files import NoRoom
from hf_transfer.layers.hashing import key
from hf_transfer.training.cache_stage import Form, Place
from hf_transfer.training.running import RunningTrainer
from hf_transfer.training.trial import ROUNDED_DTYPES

INPUT_PREFIX = "batch/"  # of the slots that hold inputs, next to those of recorded outputs
CONTENT = "content"  # the checksum of a text, stored like an input


@dataclass
class Shelf:
    """What is kept of the examples for one stage.

    Attributes:
        cut: where the model is entered.
        kept: memory or disk.
        below: names of the parameters below the boundary.
        stores: by name of the source; filled in by `record`.
    """

    cut: Cut
    kept: Place
    below: tuple[str, ...]
    stores: dict[str, Store] = field(default_factory=dict)


def slots_of(cut: Cut, stored_inputs: dict[str, Form], dtype: str) -> list[Slot]:
    """What a store holds of every example.

    Args:
        cut: with the outputs to record.
        stored_inputs: {name: form} of the inputs that are stored as well.
        dtype: `boundary_cache_dtype`.
    """
    rounded = ROUNDED_DTYPES.get(dtype)
    outputs = [
        Slot(
            name,
            leaf.shape,
            leaf.dtype,
            leaf.ragged,
            rounded if rounded is not None and leaf.dtype.is_floating_point else leaf.dtype,
        )
        for name, (_, _, leaf) in cut.stored.items()
    ]
    inputs = [Slot(INPUT_PREFIX + name, shape, kind, False, kind) for name, (shape, kind) in stored_inputs.items()]
    return outputs + inputs


def folder_of(trainer: RunningTrainer) -> Path:
    """The folder of all stores on disk."""
    given = trainer.args.boundary_cache_dir
    return budget.default_folder() if given is None else Path(given)


def record(
    trainer: RunningTrainer, shelves: Sequence[Shelf], sources: Sequence[Source], stored_inputs: dict[str, Form]
) -> str:
    """Fill shelves; called by all processes.

    Args:
        trainer: its model is left in eval mode.
        shelves: of the stages.
        sources: of the examples.
        stored_inputs: {name: form} of the inputs that are stored as well.

    Returns:
        Why it failed, as part of a sentence; empty if it did not.
    """
    recording = _Recording(trainer, shelves, stored_inputs)
    for source in sources:
        for work in (recording.allocate, recording.fill):
            failure = ""
            try:
                work(source)
            except (Refused, NoRoom, UserError) as error:  # the last: boundary_cache_dtype cannot hold a value
                failure = str(error).rstrip(".")
            if failure := recording.first_failure(failure):
                recording.discard()
                return failure
    for shelf in shelves:
        for store in shelf.stores.values():
            store.share(trainer.args.device)
    return ""


class _Recording:
    def __init__(self, trainer: RunningTrainer, shelves: Sequence[Shelf], stored_inputs: dict[str, Form]):
        self.trainer, self.shelves, self.stored_inputs = trainer, shelves, stored_inputs
        self.args = trainer.args

    def first_failure(self, failure: str) -> str:
        """The failure of the first rank that has one."""
        if self.args.world_size == 1:
            return failure
        return next((reason for reason in gather_object([failure]) if reason), "")

    def discard(self) -> None:
        """Remove what was recorded in part: the first process of a machine, once the others have closed it."""
        is_main = self.args.local_process_index == 0
        for comes_first in (False, True):
            for shelf in self.shelves if is_main == comes_first else ():
                for store in shelf.stores.values():
                    store.discard()
            if self.args.world_size > 1:
                self.trainer.accelerator.wait_for_everyone()

    # ---- stores ----

    def allocate(self, source: Source) -> None:
        """Open the stores of a source.

        Raises:
            NoRoom: there is not enough memory or disk space, or something cannot be kept on disk.
        """
        for shelf in self.shelves:
            slots = slots_of(shelf.cut, self.stored_inputs, self.args.boundary_cache_dtype)
            if shelf.kept is Place.MEMORY:
                pin = self.args.device.type == "cuda"
                shelf.stores[source.name] = Store(slots, source.lengths, source.num_rows, pin=pin)
            else:
                self._open_on_disk(shelf, source, slots)

    def _open_on_disk(self, shelf: Shelf, source: Source, slots: list[Slot]) -> None:
        """The main process of a machine creates the files, then the others open them."""
        is_main, folder, rows, failure = (
            self.args.local_process_index == 0,
            folder_of(self.trainer),
            source.num_rows,
            "",
        )
        place = budget.entry(folder, self._key(shelf, source))
        given = self.args.boundary_cache_budget
        if is_main:
            try:
                most = budget.disk_budget(folder) if given is None else round(given * 1e9)
                budget.make_room(folder, nbytes(slots, source.lengths, rows), most, place)
                shelf.stores[source.name] = Store(slots, source.lengths, rows, place)
            except NoRoom as error:
                failure = str(error)
            except OSError as error:
                failure = f"{folder} cannot be used ({one_line(error)})"
        if failure := self.first_failure(failure):
            raise NoRoom(failure)
        if not is_main:
            shelf.stores[source.name] = Store(slots, source.lengths, rows, place, main=False)

    def _key(self, shelf: Shelf, source: Source) -> str:
        """A key of everything that the recorded outputs depend on.

        Raises:
            NoRoom: a change of something that they depend on would go unnoticed.
        """
        model = self.trainer.model
        parts = {
            "the examples": digests.dataset_digest(source.dataset),
            "the model's code": digests.code_digest(model),
            "the collator": collator_digest(source.collate),
        }
        for what, digest in parts.items():
            if digest is None:
                raise NoRoom(
                    f"a change of {what} would go unnoticed, so nothing is kept on disk; use boundary_cache: memory"
                )
        buffers = [name for name, _ in model.named_buffers()]
        precision = (self.trainer.accelerator.mixed_precision, self.args.boundary_cache_dtype, self.args.device.type)
        return key(
            {name: str(digest) for name, digest in parts.items()}
            | {
                "weights": digests.weights_digest(model, [*shelf.below, *buffers]),
                "views": str(source.num_views),
                "boundary": repr(sorted(shelf.cut.stored)),
                "batches": repr((self._batch_size, *precision, torch.get_float32_matmul_precision())),
            }
        )

    # ---- the pass ----

    def fill(self, source: Source) -> None:
        """Record this process's share of the missing examples, in batches of like length.

        Raises:
            Refused: an example has no value for a stored input.
            NoRoom: another run is recording into the same store.
        """
        stores = [shelf.stores[source.name] for shelf in self.shelves]
        missing = set[int]().union(*(store.missing() for store in stores))
        # A disk may belong to one machine: then each machine records everything.
        rank, world = self.args.process_index, self.args.world_size
        if any(shelf.kept is Place.DISK for shelf in self.shelves):
            rank, world = self.args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        batches = batches_by_length(len(source.dataset), source.lengths, self._batch_size)
        own, views = batches[rank::world], source.num_views
        with contextlib.ExitStack() as stack:
            for store in stores if self.args.local_process_index == 0 else ():
                if not stack.enter_context(store.lock_recording()):
                    raise NoRoom("another run is recording the same examples at this moment")
            for view in range(views):
                todo = [b for b in own if any(number * views + view in missing for number in b)]
                with contextlib.nullcontext() if source.views is None else source.views.fixed(view):
                    self._fill_view(source, todo, views, view)
        for store in stores:
            store.flush()

    @property
    def _batch_size(self) -> int:
        """Without gradients a batch takes less memory than in training."""
        return max(self.args.eval_batch_size, self.args.train_batch_size)

    def _fill_view(self, source: Source, todo: list[list[int]], views: int, view: int) -> None:
        loader = DataLoader(
            Numbered(source.dataset, StoredInputs()),
            batch_sampler=todo,
            collate_fn=NumberedCollator(source.collate, StoredInputs()),
            num_workers=self.args.dataloader_num_workers,
        )
        cuts = [shelf.cut for shelf in self.shelves]
        for loaded in loader:
            numbers = loaded.pop(NUMBERS)
            batch = dict(self.trainer._prepare_inputs(loaded))
            self.trainer.model.eval()
            with self.trainer.accelerator.autocast():
                recorded = replay.record(self.trainer.model, cuts, batch)
            rows = [number * views + view for number in numbers]
            for shelf, tensors in zip(self.shelves, recorded, strict=True):
                store = shelf.stores[source.name]
                for name, (_, _, leaf) in shelf.cut.stored.items():
                    value = tensors[name].cpu()
                    if leaf.ragged:
                        store.put(rows, name, unpadded(value, positions_of(batch), numbers, source.lengths))
                    else:
                        store.put(rows, name, value)
                for name, values in self._inputs(batch).items():
                    store.put(rows, INPUT_PREFIX + name, values)
                store.mark(rows)

    def _inputs(self, batch: Batch) -> Batch:
        """The inputs that are stored.

        Raises:
            Refused: the batch lacks one: held-out examples may have no labels.
        """
        values = {**batch, CONTENT: content_of(batch)}
        if absent := [name for name in self.stored_inputs if values.get(name) is None]:
            raise Refused(f"some examples have no {absent[0]}")
        return {name: values[name].cpu() for name in self.stored_inputs}
