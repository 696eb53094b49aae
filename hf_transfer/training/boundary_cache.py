"""Skip the frozen part: what it computes is computed once for each example, stored, and replayed.

Below the boundary, the first layer group in which anything trains, nothing changes and nothing is random, so that an
epoch need only pay for what lies above. `replay` finds where a model can be entered and enters it; `store` keeps what
crosses; this decides for each stage of a plan whether that is exact and pays, records, and checks the first batch of
every stage both ways.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_transfer.errors import one_line
from hf_transfer.features import replay, store
from hf_transfer.features.examples import (
    NUMBERS,
    SKIPPED,
    TRAINING,
    VALIDATION,
    Numbered,
    NumberedCollator,
    Source,
    Views,
    content_of,
    has_changed,
    is_numbered,
    lengths_of,
    padded,
)
from hf_transfer.features.replay import Batch, Cut, Refused
from hf_transfer.features.store import Store
from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.training import ddp, recording, trial
from hf_transfer.training.recording import BESIDE, CONTENT, Shelf, folder_of, slots_of
from hf_transfer.training.running import RunningTrainer
from hf_transfer.training.trial import Form

_TRIED = 8  # examples
_UNASKED = 10 * 10**9  # bytes that `auto` puts on a disk where no budget says more
_WORTH = 1.25  # times fewer operations, below which nothing is kept unless it was asked for: trying costs too
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


# ---- stages --------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """What is known of the cache in one stage.

    Attributes:
        stage: its name.
        epochs: how long it is expected to last.
        cut: where the model is entered; None where it cannot be.
        why: the reason that it is off; empty while it is on.
        kept: memory or disk.
        nbytes: that it takes.
        gain: expected, times faster, recording included.
        operations: floating-point, of the frozen part, for the examples that were tried.
        full, top, recording: seconds that these took: a step without, with the cache; recording.
        step_gain: of a batch that was computed both ways.
        error: largest difference of its logits, relative.
    """

    stage: str
    epochs: float
    cut: Cut | None = None
    why: str = ""
    kept: str = ""
    nbytes: int = 0
    gain: float | None = None
    operations: int = 0
    full: float = 0.0
    top: float = 0.0
    recording: float = 0.0
    unneeded: dict[str, Form] = field(default_factory=dict)
    stores: dict[str, Store] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    step_gain: float | None = None
    error: float | None = None
    record_seconds: float = 0.0
    step_seconds: float = 0.0
    full_per_position: float = 0.0
    positions: int = 0
    steps: int = 0
    told: bool = False

    @property
    def store(self) -> Store | None:
        """Of the training examples."""
        return self.stores.get(TRAINING)

    def note(self, seen: trial.Trial) -> None:
        """Keep what a trial of this stage showed."""
        self.cut, self.full, self.top, self.error = seen.cut, seen.full, seen.top, seen.error
        self.step_gain = seen.full / max(seen.top, 1e-9)

    def close(self) -> None:
        """Let go what is kept."""
        while self.stores:
            self.stores.popitem()[1].close()

    @property
    def measured_gain(self) -> float | None:
        """Times faster than without, so far, by the time that a batch took without; recording included."""
        if not self.steps:
            return None
        return self.full_per_position * self.positions / max(self.step_seconds + self.record_seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """As `results.json` has it."""
        if self.why or self.cut is None:
            return {"kept": "off", "why": self.why}
        return {
            "kept": self.kept,
            "at": self.cut.where,
            "bytes": self.nbytes,
            "record_seconds": self.record_seconds,
            "expected_gain": self.gain,
            "step_gain": self.step_gain,
            "measured_gain": self.measured_gain,
            "largest_difference": self.error,
        }


@dataclass
class Replayed:
    """The examples of a batch, where they are replayed."""

    entry: Entry
    source: Source
    numbers: list[int]


class BoundaryCache:
    """Replays the frozen part in the stages of a trainer's plan.

    Attributes:
        blocked: why the examples of the run are not the same in every epoch, sentences for the user; empty where they
            are.
        views: of each example, where several are stored.
        entries: what was decided, by stage of the plan.
        decided: whether each stage is replayed, as a checkpoint had it.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.blocked: list[str] = []
        self.views: Views | None = None
        self.entries: list[Entry] = []
        self.decided: list[bool] | None = None
        self._plan: Plan | None = None
        self._sources: dict[str, Source] = {}
        self._current: Entry | None = None
        self._beside: dict[str, Form] = {}
        self._operations = 0

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def wanted(self) -> bool:
        args = self.trainer.args
        # A head that is solved for sees each example once.
        return self.trainer.plan is not None and args.boundary_cache != "off" and args.probe_solver != "lbfgs"

    @property
    def device(self) -> torch.device:
        return self.trainer.args.device

    @property
    def decisions(self) -> list[bool]:
        """Whether each stage is replayed; empty before that is known."""
        return [not entry.why for entry in self.entries]

    def recall(self, decisions: list[bool] | None) -> None:
        """Decide as the run did that is gone on with: replayed or not, a result differs in its last bits."""
        if decisions is not None and decisions != self.decisions:
            self.decided, self._plan = decisions, None

    def lines(self) -> list[str]:
        """What was decided, for a person."""
        if not self.entries:
            return []
        found = ["Boundary cache:"]
        for i, entry in enumerate(self.entries):
            entry.told = True
            name = f"  stage {i + 1} ({entry.stage}): "
            if entry.why:
                found.append(f"{name}off: {entry.why}")
                continue
            assert entry.cut is not None
            gain = f", about {entry.gain:.1f}x faster with all stages that use it" if entry.gain else ""
            found.append(f"{name}keeps what {entry.cut.where} gives in {entry.kept}, {_size(entry.nbytes)}{gain}")
            if entry.error is not None and self.trainer.args.boundary_cache_dtype != "auto":
                found[-1] += (
                    f"; in {self.trainer.args.boundary_cache_dtype} the logits differ by up to {entry.error:.1e} of "
                    "the largest"
                )
        return found

    # ---- deciding ----

    def decide(self) -> None:
        """Choose the stages that are replayed, before training; called by all processes."""
        plan = self.trainer.plan
        if not self.wanted or plan is None or (self._plan is not None and _timeless(self._plan) == _timeless(plan)):
            return
        self.finish()
        self._plan = plan
        left = [s.epochs for s in plan.stages]
        usual = plan.num_train_epochs / len(plan.stages)
        self.entries = [Entry(s.name, usual if e is None else e) for s, e in zip(plan.stages, left, strict=True)]
        why = self._impossible() or self._pointless()
        if not why:
            with _untouched(self.model):
                try:
                    why = self._examine(plan)
                except _FAILURES as error:  # whatever a model does not bear, it is trained without
                    why = f"the model cannot be tried ({one_line(error, 120)})"
        for entry in self.entries:
            entry.why = entry.why or why
        self._choose()
        (decided,) = broadcast_object_list([[(e.why, e.kept) for e in self.entries]])
        for entry, (why, kept) in zip(self.entries, decided, strict=True):
            entry.why, entry.kept = why, kept
        self.decided = None

    def _impossible(self) -> str:
        trainer, args = self.trainer, self.trainer.args
        if self.blocked:
            return " ".join(self.blocked)
        if not is_numbered(trainer.train_dataset):
            return "the training set is a stream, whose examples have no number"
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return "the parameters are in parts on several devices"
        if args.n_gpu > 1:
            return "one process trains on several GPUs; launch one for each"
        if args.torch_compile:
            return "torch_compile has compiled what would be skipped"
        return ""

    def _pointless(self) -> str:
        """The reason where every stage trains the group that the input enters."""
        first = self.trainer.layer_groups[0].name
        found = f"{first}, where the input enters, trains"
        return found if all(depth == 0 for depth in self._lowest) else ""

    @property
    def _lowest(self) -> list[int]:
        """By stage, the first group in which anything trains."""
        assert self._plan is not None
        depths = {name: i for i, (name, _) in enumerate(self._plan.groups)}
        return [min(depths[group] for group in stage.trainable) for stage in self._plan.stages]

    def _examine(self, plan: Plan) -> str:
        """Find the cuts, and try them on a batch; the reason where there are none at all."""
        source = self._source(TRAINING)
        numbers = self._sample(len(source.dataset))
        first, again = (self._load(source, numbers) for _ in range(2))
        if not replay.equal(first, again):
            return "the examples are not the same each time they are read (live augmentation)"
        sources = [self._source(name) for name in self._seen]
        if replay.length_of(first):
            for one in sources:
                one.lengths = lengths_of(one.dataset)
        self._beside = {}
        self._operations = trial.operations(self.trainer, first)
        for stage, entry in zip(plan.stages, self.entries, strict=True):
            with self._as_in(stage):
                try:
                    with self.trainer.accelerator.autocast():
                        entry.cut = replay.find_cut(self.model, self.trainer.layer_groups, dict(first))
                    self._try(entry, first)
                except Refused as refusal:
                    entry.why = str(refusal)
                except _FAILURES as error:
                    entry.cut, entry.why = None, f"the model cannot be traced ({one_line(error, 120)})"
        self._choose_inputs(first)
        for entry in self.entries:
            if entry.cut is not None:
                slots = slots_of(entry.cut, self._beside, self.trainer.args.boundary_cache_dtype)
                entry.nbytes = sum(store.nbytes(slots, one.lengths, one.num_rows) for one in sources)
        return ""

    def _choose_inputs(self, batch: Batch) -> None:
        """What of a batch is stored, so that it need not be read while nothing else of it is needed."""
        content = content_of(batch)
        if content is not None:
            self._beside[CONTENT] = ((), content.dtype)
        forms = [entry.unneeded for entry in self.entries if entry.unneeded]
        if forms:
            beside = {name: value for name, value in batch.items() if not any(name in form for form in forms)}
            self._beside |= {name: (tuple(value.shape[1:]), value.dtype) for name, value in beside.items()}

    @property
    def _seen(self) -> tuple[str, ...]:
        """The sources whose examples are seen again and again, and by number."""
        args, data = self.trainer.args, self.trainer.eval_dataset
        evaluates = is_numbered(data) and not isinstance(data, dict) and args.eval_strategy != "no"
        return (TRAINING, VALIDATION) if evaluates and not args.include_for_metrics else (TRAINING,)

    def _source(self, name: str) -> Source:
        dataset = self.trainer.train_dataset if name == TRAINING else self.trainer.eval_dataset
        known = self._sources.get(name)
        if known is None or known.given is not dataset:
            known = Source.of(self.trainer, name, dataset, self.views if name == TRAINING else None)
            self._sources[name] = known
        return known

    def _sample(self, count: int) -> list[int]:
        """A few examples to try, drawn at random but always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(count, generator=generator)[: min(_TRIED, self.trainer.args.train_batch_size)].tolist()

    def _load(self, source: Source, numbers: Sequence[int]) -> Batch:
        batch = source.collate([source.dataset[number] for number in numbers])
        return dict(self.trainer._prepare_inputs(dict(batch)))

    @contextlib.contextmanager
    def _as_in(self, stage: Stage) -> Iterator[None]:
        """In here exactly that trains which trains in `stage`."""
        unfreezing = self.trainer.unfreezing
        assert unfreezing is not None
        before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        frozen, active = unfreezing.frozen, unfreezing.trains(stage)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in active)
        unfreezing.frozen = frozen_modules(self.model, self.trainer.layer_groups)
        try:
            yield
        finally:
            unfreezing.frozen = frozen
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(before[name])

    def _try(self, entry: Entry, batch: Batch) -> None:
        """Raises:
        Refused: with the cache another result comes out.
        """
        assert entry.cut is not None
        warm_up = entry is self.entries[0]
        seen = trial.try_cut(self.trainer, entry.cut, batch, rounds=2 if warm_up else 1)
        entry.note(seen)
        entry.recording, entry.operations, entry.unneeded = seen.recording, seen.operations, seen.unneeded or {}

    def _choose(self) -> None:
        """Which stages fit, and pay."""
        args, possible = self.trainer.args, [e for e in self.entries if e.cut is not None and not e.why]
        if not possible:
            return
        if self.decided is not None and len(self.decided) == len(self.entries):  # a run that is gone on with
            for entry, on in zip(self.entries, self.decided, strict=True):
                entry.why = entry.why or ("" if on else "as when the run began")
            possible = [e for e in possible if not e.why]
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        budget = None if args.boundary_cache_budget is None else int(args.boundary_cache_budget * 1e9)
        memory = store.memory_budget(processes) if budget is None else budget // processes
        disk = store.disk_budget(folder_of(self.trainer)) if budget is None else budget
        if args.boundary_cache == "auto" and budget is None:
            disk = min(disk, _UNASKED)
        for entry in possible:
            if args.boundary_cache in ("auto", "memory") and entry.nbytes <= memory:
                entry.kept = "memory"
                memory -= entry.nbytes
            elif args.boundary_cache in ("auto", "disk") and entry.nbytes <= disk:
                entry.kept = "disk"
                disk -= entry.nbytes
            else:
                entry.why = f"{_size(entry.nbytes)} do not fit; see boundary_cache_budget and boundary_cache_dtype"
        possible = [e for e in possible if not e.why]
        if not possible or args.boundary_cache != "auto" or self.decided is not None:
            self._expect(possible)
            return
        self._expect(possible)
        # By what is to be computed, not by the clock: the same run decides the same each time.
        without = sum(e.epochs * (self._operations + 2 * (self._operations - e.operations)) for e in possible)
        with_it = sum(e.epochs * 3 * (self._operations - e.operations) for e in possible)
        gain = without / max(with_it + max(e.operations for e in possible) * self._sources[TRAINING].num_views, 1)
        if gain < _WORTH:
            for entry in possible:
                entry.why = f"it would not pay ({gain:.2f}x fewer operations, with those of recording)"

    def _expect(self, entries: list[Entry]) -> None:
        """Times faster that these stages are expected to be together: every batch as the one that was tried."""
        without = sum(e.epochs * e.full for e in entries)
        recording = max((e.recording for e in entries), default=0.0) * self._sources[TRAINING].num_views
        gain = without / max(recording + sum(e.epochs * e.top for e in entries), 1e-9)
        for entry in entries:
            entry.gain = gain

    # ---- training ----

    def wrap(self, dataset: Any, name: str) -> tuple[Any, Callable[[list[Any]], Any]] | None:
        """(data set, collator) whose batches say which examples they hold; None where they need not."""
        known = dataset is (self.trainer.train_dataset if name == TRAINING else self.trainer.eval_dataset)
        if not self.wanted or not known or name not in self._seen or not is_numbered(dataset):
            return None
        source = self._source(name)
        return Numbered(source.dataset, source.rows), NumberedCollator(source.collate, source.rows)

    def begin(self, index: int) -> None:
        """Stage `index` begins: what it needs is recorded. Called by all processes."""
        self.end()
        if not self.wanted:
            return
        self.decide()
        entry = self.entries[index]
        entry.verified.clear()
        entry.step_seconds, entry.positions, entry.steps = 0.0, 0, 0
        if not entry.why and not entry.stores:
            with _untouched(self.model):
                self._record(self._together(index))
        if entry.why and not entry.told and self.trainer.args.boundary_cache != "auto":
            self._off(entry, entry.why)
        self._current = None if entry.why else entry
        self._read_beside()
        self._skip_reading()

    def _read_beside(self) -> None:
        """What was stored of the batches themselves."""
        for name, kept in self._current.stores.items() if self._current is not None else ():
            source = self._sources[name]
            first = list(range(0, source.num_rows, source.num_views))
            found = {beside: kept.get(first, BESIDE + beside) for beside in self._beside}
            source.contents = found.pop(CONTENT, None)
            if self._current is not None and self._current.unneeded and source.rows.kept is None:
                source.rows.kept = {beside: value.share_memory_() for beside, value in found.items()}

    def end(self) -> None:
        """The stage has ended: what it alone needed goes."""
        entry, self._current = self._current, None
        if entry is not None:
            entry.close()
        self._skip_reading()

    def finish(self) -> None:
        """Training has ended: nothing is kept but what is known of the stages."""
        self.end()
        for entry in self.entries:
            entry.close()
        for source in self._sources.values():
            source.rows.kept = None

    def _together(self, index: int) -> list[Entry]:
        """This stage, and the later ones below whose boundary nothing trains before they begin."""
        lowest, found = self._lowest, []
        for i, entry in enumerate(self.entries[index:], index):
            if not entry.why and not entry.stores and all(lowest[i] <= lowest[j] for j in range(index, i)):
                found.append(entry)
        return found

    def _record(self, entries: list[Entry]) -> None:
        """Fill the stores of several stages in one pass over the examples."""
        began = time.perf_counter()
        shelves = []
        for entry in entries:
            assert entry.cut is not None
            lowest = self._lowest[self.entries.index(entry)]
            below = tuple(name for group in self.trainer.layer_groups[:lowest] for name in group.parameters)
            shelves.append(Shelf(entry.cut, entry.kept, below, entry.stores))
        sources = [self._source(name) for name in self._seen]
        why = recording.record(self.trainer, shelves, sources, self._beside)
        for entry in entries:
            entry.record_seconds = (time.perf_counter() - began) / len(entries)
            if why:
                self._off(entry, why)

    def _skip_reading(self) -> None:
        """Pictures need not be read while every batch is replayed."""
        entry = self._current
        for source in self._sources.values():
            source.rows.ready = entry is not None and bool(entry.unneeded) and source.name in entry.verified

    def _off(self, entry: Entry, why: str) -> None:
        entry.why, entry.told = why, True
        entry.close()
        if self._current is entry:
            self._current = None
        self._skip_reading()
        if self.trainer.is_world_process_zero():
            sys.stderr.write(f"hf-transfer: boundary_cache is off in stage {entry.stage!r}: {why}.\n")

    def take(self, inputs: Any, name: str = TRAINING) -> tuple[Batch, Replayed | None]:
        """(what the model reads, what of it is replayed): the first batch of a stage is run both ways.

        Args:
            inputs: a batch of a loader of the trainer.
            name: TRAINING or VALIDATION.
        """
        if NUMBERS not in inputs:
            return inputs, None
        inputs = dict(inputs)
        numbers, source = inputs.pop(NUMBERS), self._sources[name]
        skipped = inputs.pop(SKIPPED, False)  # what else there is of them was not read
        entry = self._current
        if entry is not None and name not in entry.stores:
            entry = None
        if entry is not None and name not in entry.verified:
            inputs, skipped = self._load(source, numbers) if skipped else self.trainer._prepare_inputs(inputs), False
            self._verify(entry, source, inputs, numbers)
            entry = self._current
        if entry is None or (skipped and not entry.unneeded):
            inputs, skipped = self._load(source, numbers) if skipped else inputs, False
        if entry is None:
            return inputs, None
        for unneeded, (shape, dtype) in entry.unneeded.items() if skipped else ():  # nobody reads it
            inputs[unneeded] = torch.ones((), dtype=dtype, device=self.device).expand(len(numbers), *shape)
        if not skipped and has_changed(source, inputs, numbers):
            self._off(entry, "an example is not what it was when it was recorded")
            return inputs, None
        return inputs, Replayed(entry, source, numbers)

    def _verify(self, entry: Entry, source: Source, inputs: Batch, numbers: list[int]) -> None:
        if has_changed(source, inputs, numbers):
            self._off(entry, "an example is not what it was when it was recorded")
            return
        try:
            assert entry.cut is not None
            rows = self._assemble(Replayed(entry, source, numbers), inputs)
            if source.name == TRAINING:
                entry.note(trial.compare(self.trainer, entry.cut, inputs, rows))
                entry.full_per_position = entry.full / _positions(source, numbers)
            else:
                trial.compare_answers(self.trainer, entry.cut, inputs, rows)
        except Refused as refusal:
            self._off(entry, str(refusal))
            return
        entry.verified.add(source.name)
        self._skip_reading()

    @contextlib.contextmanager
    def replaying(self, inputs: Batch, replayed: Replayed | None) -> Iterator[None]:
        """In here the model's frozen part gives what was recorded of these examples."""
        if replayed is None:
            yield
            return
        began, entry = time.perf_counter(), replayed.entry
        assert entry.cut is not None
        rows, count, length = self._assemble(replayed, inputs), len(replayed.numbers), replay.length_of(inputs)
        with replay.replaying(self.model, entry.cut, rows, count, length, self.device):
            yield
        if replayed.source.name == TRAINING:
            entry.step_seconds += time.perf_counter() - began
            entry.positions += _positions(replayed.source, replayed.numbers)
            entry.steps += 1

    def _assemble(self, replayed: Replayed, inputs: Batch) -> dict[str, torch.Tensor]:
        """What was recorded of these examples, padded as `inputs` are, in the precision that it was computed in."""
        entry, source, numbers = replayed.entry, replayed.source, replayed.numbers
        assert entry.cut is not None
        rows = numbers if source.views is None else [source.views.row(number) for number in numbers]
        positions = replay.positions_of(inputs)
        positions = None if positions is None else positions.cpu()
        found = {}
        for name, (_, _, leaf) in entry.cut.stored.items():
            value = entry.stores[source.name].get(rows, name)
            if leaf.ragged:
                value = padded(value, positions)
            found[name] = value.to(self.device, leaf.dtype, non_blocking=True)
        return found

    def summary(self, index: int) -> dict[str, Any] | None:
        """What `results.json` says of a stage."""
        return self.entries[index].to_dict() if index < len(self.entries) else None

    @property
    def gain(self) -> float | None:
        """Of the stage so far, measured."""
        return None if self._current is None else self._current.measured_gain


# ---- small ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and random numbers are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with ddp.without_a_trace(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _timeless(plan: Plan) -> list[Stage]:
    """The stages, whenever they begin."""
    return [replace(stage, start=None) for stage in plan.stages]


def _positions(source: Source, numbers: list[int]) -> int:
    """Of a batch of texts, with its padding; of pictures, how many there are. Also where they were not read."""
    return len(numbers) * (1 if source.lengths is None else max(source.lengths[number] for number in numbers))


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"
