"""For each stage of a plan: is the boundary cache exact, does it fit, and does it pay?"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from hf_transfer.errors import UserError, one_line
from hf_transfer.features import budget
from hf_transfer.features.batches import Batch, equal, length_of
from hf_transfer.features.cut import Refused
from hf_transfer.features.examples import TRAINING, Source, content_of, is_numbered, lengths_of
from hf_transfer.features.slots import nbytes
from hf_transfer.features.trace import find_cut
from hf_transfer.layers.side_effects import untouched
from hf_transfer.plan.plan import Plan
from hf_transfer.training import trial
from hf_transfer.training.cache_stage import CachedStage, Form, Off, OffReason, Place, format_bytes
from hf_transfer.training.recording import CONTENT, folder_of, slots_of
from hf_transfer.training.running import RunningTrainer
from hf_transfer.training.sources import Sources

_SAMPLE = 8  # examples
_AUTO_DISK = 10 * 10**9  # bytes that `auto` may use on disk if no budget is given
_WORTHWHILE = 1.25  # `auto` needs so many times fewer operations (20% less): deciding and recording take time too
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def lowest_trained(plan: Plan) -> list[int]:
    """For each stage, the index of the lowest layer group that trains."""
    depths = {name: i for i, (name, _) in enumerate(plan.groups)}
    return [min(depths[group] for group in stage.trainable) for stage in plan.stages]


def freezes_again(plan: Plan) -> bool:
    """Whether a layer group trains in a stage and is frozen in a later one."""
    return any(set(a.trainable) - set(b.trainable) for a, b in zip(plan.stages, plan.stages[1:], strict=False))


def _rounded_up(value: float) -> str:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}"


class Decision:
    """Decides for each stage of a plan whether it is replayed.

    Args:
        trainer: whose plan it is.
        sources: its datasets.
        plan: with the stages.
        blocked: sentences that say why the examples differ between epochs; empty if they do not.
        recalled: whether each stage was replayed in the run that is resumed; None for a new run.

    Attributes:
        entries: the decision, one per stage.
        stored_inputs: {name: form} of the inputs that are stored as well.
    """

    def __init__(
        self,
        trainer: RunningTrainer,
        sources: Sources,
        plan: Plan,
        blocked: Sequence[str],
        recalled: Sequence[bool] | None,
    ):
        self.trainer, self.sources, self.plan = trainer, sources, plan
        self.blocked, self.recalled = blocked, recalled
        epochs = plan.num_train_epochs / len(plan.stages)  # of a stage that ends at a plateau
        self.entries = [CachedStage(s.name, epochs if s.epochs is None else s.epochs) for s in plan.stages]
        self.stored_inputs: dict[str, Form] = {}
        self._operations = 0  # floating-point operations of a forward pass on the sample

    def decide(self) -> list[CachedStage]:
        """Decide; called by all processes, which agree on the main process's decision."""
        off = self._impossible() or self._pointless()
        if off is None:
            with untouched(self.trainer.model):
                try:
                    off = self._examine()
                except _FAILURES as error:  # whatever the model does not support, it trains without
                    off = Off(OffReason.NOT_RUNNABLE, one_line(error, 120))
        for entry in self.entries if off is not None else ():
            entry.off = entry.off or off
        self._choose()
        (decided,) = broadcast_object_list([[(entry.off, entry.kept) for entry in self.entries]])
        for entry, (reason, kept) in zip(self.entries, decided, strict=True):
            entry.off, entry.kept = reason, kept
        return self.entries

    # ---- exact ----

    def _impossible(self) -> Off | None:
        trainer, args = self.trainer, self.trainer.args
        if self.blocked:
            return Off(OffReason.NOT_FIXED, "; ".join(self.blocked))
        if trainer.ema.decay is not None and freezes_again(self.plan):
            return Off(OffReason.AVERAGED)
        if not is_numbered(trainer.train_dataset):
            return Off(OffReason.STREAM)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return Off(OffReason.SHARDED)
        if args.n_gpu > 1:
            return Off(OffReason.DATA_PARALLEL)
        return Off(OffReason.COMPILED) if args.torch_compile else None

    def _pointless(self) -> Off | None:
        if any(lowest_trained(self.plan)):
            return None
        return Off(OffReason.INPUT_TRAINS, self.trainer.layer_groups[0].name)

    def _examine(self) -> Off | None:
        """Find the cuts and try them on a sample; returns why there are none at all."""
        source = self.sources[TRAINING]
        numbers = self._sample(len(source.dataset))
        batch, again = (self.sources.load(source, numbers) for _ in range(2))
        if not equal(batch, again):
            return Off(OffReason.RANDOM_EXAMPLES)
        sources = [self.sources[name] for name in self.sources.names]
        if length_of(batch):
            for one in sources:
                one.lengths = lengths_of(one.dataset)
        self._operations = trial.operations(self.trainer, batch)
        for stage, entry, lowest in zip(self.plan.stages, self.entries, lowest_trained(self.plan), strict=True):
            if not lowest:
                entry.turn_off(OffReason.INPUT_TRAINS, self.trainer.layer_groups[0].name)
                continue
            with self.trainer.unfreezing.training_as_in(stage):
                try:
                    with self.trainer.accelerator.autocast():
                        kept = self.trainer.unfreezing.kept_statistics
                        entry.cut = find_cut(self.trainer.model, self.trainer.layer_groups, dict(batch), kept)
                    self._try(entry, batch)
                except Refused as refusal:
                    entry.turn_off(OffReason.NOT_EXACT, str(refusal))
                except _FAILURES as error:
                    entry.cut = None
                    entry.turn_off(OffReason.NOT_TRACEABLE, one_line(error, 120))
        self._choose_inputs(batch)
        self._measure(sources)
        return None

    def _sample(self, count: int) -> list[int]:
        """Numbers of a few examples, drawn at random but always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(count, generator=generator)[: min(_SAMPLE, self.trainer.args.train_batch_size)].tolist()

    def _try(self, entry: CachedStage, batch: Batch) -> None:
        """Compute the sample both ways.

        Raises:
            Refused: the results differ.
        """
        assert entry.cut is not None
        warms_up = entry is self.entries[0]
        result = trial.try_cut(self.trainer, entry.cut, batch, rounds=2 if warms_up else 1)
        entry.note_trial(result.cut, result.full, result.top, result.error)
        entry.recording, entry.operations = result.recording, result.operations
        entry.unneeded = result.unneeded or {}

    def _choose_inputs(self, batch: Batch) -> None:
        """Choose the inputs that are stored, so that an example need not be read if the others are not needed."""
        content = content_of(batch)
        if content is not None:
            self.stored_inputs[CONTENT] = ((), content.dtype)
        unneeded = [entry.unneeded for entry in self.entries if entry.unneeded]
        if unneeded:
            needed = {name: value for name, value in batch.items() if not any(name in forms for forms in unneeded)}
            self.stored_inputs |= {name: (tuple(value.shape[1:]), value.dtype) for name, value in needed.items()}

    def _measure(self, sources: Sequence[Source]) -> None:
        for entry in self.entries:
            if entry.cut is not None:
                slots = slots_of(entry.cut, self.stored_inputs, self.trainer.args.boundary_cache_dtype)
                entry.nbytes = sum(nbytes(slots, one.lengths, one.num_rows) for one in sources)

    # ---- fits and pays ----

    @property
    def _possible(self) -> list[CachedStage]:
        return [entry for entry in self.entries if entry.cut is not None and entry.off is None]

    def _choose(self) -> None:
        """Turn off the stages that do not fit or do not pay; a resumed run decides as it did when it began."""
        if self.recalled is not None and len(self.recalled) == len(self.entries):
            for entry, was_on in zip(self.entries, self.recalled, strict=True):
                if not was_on:
                    entry.turn_off(OffReason.AS_BEFORE)
        if self._possible:
            self._place(self._possible)
        possible = self._possible
        gain = self._expected_gain(possible)
        for entry in possible:
            entry.gain, entry.is_shared = gain, len(possible) > 1
        if possible and self.trainer.args.boundary_cache == "auto" and self.recalled is None:
            ratio = self._operations_ratio(possible)
            for entry in possible if ratio < _WORTHWHILE else ():
                entry.turn_off(OffReason.NOT_WORTHWHILE, f"{max(0.0, 1 - 1 / ratio):.0%}")

    def _place(self, entries: Sequence[CachedStage]) -> None:
        """Memory first, then disk, stage by stage.

        Raises:
            UserError: the cache was asked for, with a budget below one batch.
        """
        args = self.trainer.args
        if too_little := self._below_a_batch(min(entry.nbytes for entry in entries)):
            if args.boundary_cache != "auto":
                raise too_little
            for entry in entries:
                entry.turn_off(OffReason.NO_ROOM, f"boundary_cache_budget: {too_little.problem.rstrip('.')}")
            return
        memory, disk = self._budgets(args)
        for entry in entries:
            if args.boundary_cache in ("auto", "memory") and entry.nbytes <= memory:
                entry.kept = Place.MEMORY
                memory -= entry.nbytes
            elif args.boundary_cache in ("auto", "disk") and entry.nbytes <= disk:
                entry.kept = Place.DISK
                disk -= entry.nbytes
            else:
                room = {"memory": f"{format_bytes(memory)} of memory", "disk": f"{format_bytes(disk)} of disk space"}
                into = " or ".join(room.values()) if args.boundary_cache == "auto" else room[args.boundary_cache]
                entry.turn_off(
                    OffReason.NO_ROOM,
                    f"{format_bytes(entry.nbytes)} do not fit into {into}; see boundary_cache_budget and "
                    "boundary_cache_dtype",
                )

    def _below_a_batch(self, nbytes: int) -> UserError | None:
        """What to say of a budget that one batch of a stage with `nbytes` exceeds."""
        given = self.trainer.args.boundary_cache_budget
        rows = sum(self.sources[name].num_rows for name in self.sources.names)
        size = min(self.trainer.args.train_batch_size, rows)
        one = nbytes * size / max(rows, 1)
        if given is None or one <= given * 1e9:
            return None
        return UserError(
            f"{given:g} GB is less than one batch: {size} examples take about {format_bytes(one)}, all examples "
            f"{format_bytes(nbytes)}.",
            f"Set it to at least {_rounded_up(nbytes / 1e9)}, or leave it out.",
            key="boundary_cache_budget",
        )

    def _budgets(self, args: Any) -> tuple[int, int]:
        """(bytes of memory for this process, bytes of disk)."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if args.boundary_cache_budget is not None:
            given = round(args.boundary_cache_budget * 1e9)
            return given // processes, given
        try:
            disk = budget.disk_budget(folder_of(self.trainer))
        except OSError:  # a folder that may not be read
            disk = 0
        return budget.memory_budget(processes), min(disk, _AUTO_DISK) if args.boundary_cache == "auto" else disk

    def _operations_ratio(self, entries: Sequence[CachedStage]) -> float:
        """Operations without the cache over those with it: unlike the clock, the same in every run.

        A backward pass counts twice a forward pass.
        """
        without = sum(e.epochs * (self._operations + 2 * (self._operations - e.operations)) for e in entries)
        with_cache = sum(e.epochs * 3 * (self._operations - e.operations) for e in entries)
        recording = max(e.operations for e in entries) * self.sources.current(TRAINING).num_views
        return without / max(with_cache + recording, 1)

    def _expected_gain(self, entries: Sequence[CachedStage]) -> float | None:
        """Speedup of these stages together, if every batch behaves like the sample."""
        if not entries:
            return None
        without = sum(e.epochs * e.full for e in entries)
        recording = max(e.recording for e in entries) * self.sources.current(TRAINING).num_views
        return without / max(recording + sum(e.epochs * e.top for e in entries), 1e-9)
