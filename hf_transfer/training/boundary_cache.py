"""Skip the frozen part: its outputs are computed once per example, stored, and replayed.

Below the boundary, the lowest layer group in which anything trains, nothing changes and nothing is random, so that an
epoch need only pay for what lies above. `features.trace` finds where a model can be entered, `features.replay` enters
it, `features.store` keeps the outputs, and `cache_decision` decides for each stage whether that is exact, fits and
pays. This module records, replays, and checks the first batch of every stage both ways.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_transfer.features import replay
from hf_transfer.features.batches import Batch, length_of, positions_of
from hf_transfer.features.cut import Refused
from hf_transfer.features.examples import (
    NUMBERS,
    SKIPPED,
    TRAINING,
    VALIDATION,
    Numbered,
    NumberedCollator,
    Source,
    Views,
    is_numbered,
    padded,
)
from hf_transfer.layers.side_effects import untouched
from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.training import recording, trial
from hf_transfer.training.cache_decision import Decision, lowest_trained
from hf_transfer.training.cache_stage import CachedStage, Form, Off, OffReason
from hf_transfer.training.recording import CONTENT, INPUT_PREFIX, Shelf
from hf_transfer.training.running import RunningTrainer
from hf_transfer.training.sources import Sources


@dataclass
class Replayed:
    """The examples of a batch that is replayed.

    Attributes:
        entry: the stage.
        source: the dataset.
        numbers: of the examples.
    """

    entry: CachedStage
    source: Source
    numbers: list[int]


class BoundaryCache:
    """Replays the frozen part in the stages of a trainer's plan.

    Attributes:
        blocked: sentences that say why the examples of the run differ between epochs; empty if they do not.
        sources: the trainer's datasets.
        entries: the cache in each stage of the plan; empty before it is decided.
        recalled: whether each stage was replayed in the run that is resumed; None for a new run.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.blocked: list[str] = []
        self.sources = Sources(trainer)
        self.entries: list[CachedStage] = []
        self.recalled: list[bool] | None = None
        self._plan: Plan | None = None
        self._current: CachedStage | None = None
        self._stored_inputs: dict[str, Form] = {}

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def views(self) -> Views | None:
        """Views of each training example, if several are stored."""
        return self.sources.views

    @views.setter
    def views(self, views: Views | None) -> None:
        self.sources.views = views

    @property
    def wanted(self) -> bool:
        """Whether the keys ask for a cache. A head that is solved for reads each example only once."""
        args = self.trainer.args
        return self.trainer.plan is not None and args.boundary_cache != "off" and args.probe_solver != "lbfgs"

    @property
    def device(self) -> torch.device:
        return self.trainer.args.device

    # ---- deciding ----

    @property
    def decisions(self) -> list[bool]:
        """Whether each stage is replayed; empty before that is decided."""
        return [entry.off is None for entry in self.entries]

    def recall(self, decisions: list[bool] | None) -> None:
        """Decide as the resumed run did: with and without the cache, results differ in their last bits."""
        if decisions and decisions != self.decisions:  # none were made where no cache was wanted
            self.recalled, self._plan = decisions, None

    def decide(self) -> None:
        """Choose the stages that are replayed, before training; called by all processes."""
        plan = self.trainer.plan
        if not self.wanted or plan is None or (self._plan is not None and _timeless(self._plan) == _timeless(plan)):
            return
        self.finish()
        self._plan = plan
        decision = Decision(self.trainer, self.sources, plan, self.blocked, self.recalled)
        self.entries = decision.decide()
        self._stored_inputs = decision.stored_inputs
        self.recalled = None

    def lines(self) -> list[str]:
        """The decision, for display."""
        for entry in self.entries:
            entry.reported = True
        dtype = self.trainer.args.boundary_cache_dtype if self.entries else ""
        lines = [f"  stage {i} ({entry.stage}): {entry.line(dtype)}" for i, entry in enumerate(self.entries, 1)]
        return ["Boundary cache:", *lines] if lines else []

    # ---- stages ----

    def begin(self, index: int) -> None:
        """Begin stage `index`: what it needs is recorded. Called by all processes."""
        self.end()
        if not self.wanted:
            return
        self.decide()
        entry = self.entries[index]
        entry.begin()
        if entry.off is None and not entry.stores:
            with untouched(self.model):
                self._record(self._recorded_together(index))
        if entry.off is not None and not entry.reported and self.trainer.args.boundary_cache != "auto":
            self._off(entry, entry.off)
        self._current = None if entry.off is not None else entry
        self._read_stored_inputs()
        self._skip_reading()

    def record_again(self, index: int) -> None:
        """Begin stage `index` again: weights below its boundary may have changed, by a rollback to an earlier stage."""
        for entry in self.entries:
            entry.close()
        self.begin(index)

    def end(self) -> None:
        """End the stage: what only it needed is released."""
        entry, self._current = self._current, None
        if entry is not None:
            entry.close()
        self._skip_reading()

    def finish(self) -> None:
        """End training: everything is released but the decisions and measurements."""
        self.end()
        for entry in self.entries:
            entry.close()
        for source in self.sources:
            source.stored.values = None

    def _recorded_together(self, index: int) -> list[CachedStage]:
        """This stage, and later ones below whose boundary nothing trains before they begin."""
        assert self._plan is not None
        lowest, together = lowest_trained(self._plan), []
        for i, entry in enumerate(self.entries[index:], index):
            if entry.off is None and not entry.stores and all(lowest[i] <= lowest[j] for j in range(index, i)):
                together.append(entry)
        return together

    def _record(self, entries: list[CachedStage]) -> None:
        """Fill the stores of several stages in one pass over the examples."""
        assert self._plan is not None
        began, shelves = time.perf_counter(), []
        for entry in entries:
            assert entry.cut is not None and entry.kept is not None
            lowest = lowest_trained(self._plan)[self.entries.index(entry)]
            below = tuple(name for group in self.trainer.layer_groups[:lowest] for name in group.parameters)
            shelves.append(Shelf(entry.cut, entry.kept, below, entry.stores))
        sources = [self.sources[name] for name in self.sources.names]
        failure = recording.record(self.trainer, shelves, sources, self._stored_inputs)
        for entry in entries:
            entry.record_seconds = (time.perf_counter() - began) / len(entries)
            if failure:
                self._off(entry, Off(OffReason.NOT_RECORDED, failure))

    def _read_stored_inputs(self) -> None:
        """Load the inputs that were stored next to the outputs."""
        entry = self._current
        for name, store in entry.stores.items() if entry is not None else ():
            source = self.sources.current(name)
            first_views = list(range(0, source.num_rows, source.num_views))
            values = {key: store.get(first_views, INPUT_PREFIX + key) for key in self._stored_inputs}
            source.contents = values.pop(CONTENT, None)
            if entry is not None and entry.unneeded and source.stored.values is None:
                source.stored.values = {key: value.share_memory_() for key, value in values.items()}

    def _skip_reading(self) -> None:
        """Images need not be read while every batch is replayed."""
        entry = self._current
        for source in self.sources:
            source.stored.suffices = entry is not None and bool(entry.unneeded) and source.name in entry.verified

    def turn_off(self, off: Off) -> None:
        """Turn the cache off in every stage where it is on, before it has recorded anything."""
        for entry in self.entries:
            if entry.off is None:
                self._off(entry, off)

    def _off(self, entry: CachedStage, off: Off) -> None:
        """Turn the cache off in a stage that has begun, and tell the user."""
        entry.off, entry.reported = off, True
        entry.close()
        if self._current is entry:
            self._current = None
        self._skip_reading()
        if self.trainer.is_world_process_zero():
            sys.stderr.write(f"hf-transfer: boundary_cache is off in stage {entry.stage!r}: {entry.why}.\n")

    # ---- batches ----

    def wrap(self, dataset: Any, name: str) -> tuple[Any, Callable[[list[Any]], Any]] | None:
        """(dataset, collator) whose batches carry the numbers of their examples; None where they need not.

        Args:
            dataset: that a loader is made for.
            name: TRAINING or VALIDATION.
        """
        if not self.wanted or not self.sources.is_own(dataset, name):
            return None
        if name not in self.sources.names or not is_numbered(dataset):
            return None
        source = self.sources[name]
        return Numbered(source.dataset, source.stored), NumberedCollator(source.collate, source.stored)

    def take(self, inputs: Any, name: str = TRAINING) -> tuple[Batch, Replayed | None]:
        """(inputs of the model, what of them is replayed); the first batch of a stage is computed both ways.

        Args:
            inputs: a batch of one of the trainer's loaders.
            name: TRAINING or VALIDATION.
        """
        if NUMBERS not in inputs:
            return inputs, None
        inputs = dict(inputs)
        numbers, source = inputs.pop(NUMBERS), self.sources.current(name)
        skipped = inputs.pop(SKIPPED, False)  # the other inputs were not read
        entry = self._current
        if entry is not None and name not in entry.stores:
            entry = None
        if entry is not None and name not in entry.verified:
            inputs = self.sources.load(source, numbers) if skipped else self.trainer._prepare_inputs(inputs)
            skipped = False
            self._verify(entry, source, inputs, numbers)
            entry = self._current
        if skipped and (entry is None or not entry.unneeded):
            inputs, skipped = self.sources.load(source, numbers), False
        if entry is None:
            return inputs, None
        for unneeded, (shape, dtype) in entry.unneeded.items() if skipped else ():
            inputs[unneeded] = torch.ones((), dtype=dtype, device=self.device).expand(len(numbers), *shape)
        if not skipped and source.has_changed(inputs, numbers):
            self._off(entry, Off(OffReason.EXAMPLE_CHANGED))
            return inputs, None
        return inputs, Replayed(entry, source, numbers)

    def _verify(self, entry: CachedStage, source: Source, inputs: Batch, numbers: list[int]) -> None:
        """Compute a batch both ways, and turn the cache off if the results differ."""
        if source.has_changed(inputs, numbers):
            self._off(entry, Off(OffReason.EXAMPLE_CHANGED))
            return
        try:
            assert entry.cut is not None
            rows = self._assemble(Replayed(entry, source, numbers), inputs)
            if source.name == TRAINING:
                result = trial.compare(self.trainer, entry.cut, inputs, rows)
                entry.note_trial(result.cut, result.full, result.top, result.error)
                entry.full_per_position = entry.full / source.positions(numbers)
            else:
                assert source.name == VALIDATION
                trial.compare_outputs(self.trainer, entry.cut, inputs, rows)
        except Refused as refusal:
            self._off(entry, Off(OffReason.NOT_EXACT, str(refusal)))
            return
        entry.verified.add(source.name)
        self._skip_reading()

    @contextlib.contextmanager
    def replaying(self, inputs: Batch, replayed: Replayed | None) -> Iterator[None]:
        """Within the context, the frozen part of the model returns what was recorded of these examples."""
        if replayed is None:
            yield
            return
        entry, source = replayed.entry, replayed.source
        assert entry.cut is not None
        with entry.timing(source.positions(replayed.numbers) if source.name == TRAINING else None, self.device):
            rows, count, length = self._assemble(replayed, inputs), len(replayed.numbers), length_of(inputs)
            with replay.replaying(self.model, entry.cut, rows, count, length, self.device):
                yield

    def _assemble(self, replayed: Replayed, inputs: Batch) -> dict[str, torch.Tensor]:
        """What was recorded of these examples, padded like `inputs`, in the dtype that it was computed in."""
        entry, source, numbers = replayed.entry, replayed.source, replayed.numbers
        assert entry.cut is not None
        rows = numbers if source.views is None else [source.views.row(number) for number in numbers]
        positions = positions_of(inputs)
        positions = None if positions is None else positions.cpu()
        assembled = {}
        for name, (_, _, leaf) in entry.cut.stored.items():
            value = entry.stores[source.name].get(rows, name)
            if leaf.ragged:
                value = padded(value, positions)
            assembled[name] = value.to(self.device, leaf.dtype, non_blocking=True)
        return assembled

    # ---- results ----

    def summary(self, index: int) -> dict[str, Any] | None:
        """The cache in stage `index`, for `results.json`; None before it is decided."""
        return self.entries[index].to_dict() if index < len(self.entries) else None

    @property
    def gain(self) -> float | None:
        """Measured speedup in the current stage; None without the cache."""
        return None if self._current is None else self._current.measured_gain


def _timeless(plan: Plan) -> list[Stage]:
    """The stages, whenever they begin."""
    return [replace(stage, start=None) for stage in plan.stages]
