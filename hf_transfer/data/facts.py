"""What is known of the data before training: counts, sizes, duplicates, leaks between splits, examples that are broken.

Everything is seen in one pass over the inputs, at most `SAMPLE` of each split. With `on_bad_example: skip` or
`drop_leaks` every example is looked at, since what is not seen cannot be left out.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from datasets import Dataset, Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.duplicates import Array, Trace, Traces
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, MULTI_LABEL, REGRESSION, Labels
from hf_transfer.data.splits import ROW, BadExample, Data
from hf_transfer.errors import UserError

SAMPLE = 100_000
_BATCH = 256
_SHOWN = 3  # examples of a finding
_LISTED = 1000  # broken examples that are kept by name
_IMBALANCED = 10.0
_HELD_OUT_FIRST = ("test", "validation", "train")
Read = Callable[[Sequence[Any]], Trace]


@dataclass
class SplitFacts:
    """One split.

    Attributes:
        examples: how many there are; `examined` of them were looked at.
        classes: examples by class; for a regression none.
        values: least, mean and greatest value of a regression.
        sizes: (least, median, 95%, greatest) of what is measured of an input.
        duplicates: examples beyond the first of their kind, equal and nearly equal.
        conflicts: examples that are equal or nearly so to one with another label.
    """

    examples: int
    examined: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    sizes: dict[str, tuple[float, ...]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=lambda: {"exact": 0, "near": 0})
    conflicts: int = 0


@dataclass
class Leak:
    """Examples of `kept` that are in `other` too: `exact` of them equal, `near` more nearly so."""

    kept: str
    other: str
    exact: int
    near: int
    shown: list[tuple[str, str]]


@dataclass
class Facts:
    """All that `train` and `plan` say of the data before training.

    Attributes:
        splits: by name.
        leaks: between splits.
        bad: what cannot be used; left out, or else training would not have begun.
        dropped: leaked examples that were removed, by split.
        cut: share of a sample that is longer than the model reads, and that limit; None where it reads all.
        seconds: what looking took.
    """

    splits: dict[str, SplitFacts]
    leaks: list[Leak] = field(default_factory=list)
    bad: list[BadExample] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    cut: tuple[float, int] | None = None
    seconds: float = 0.0

    @property
    def imbalance(self) -> float:
        """Training examples of the largest class for each of the smallest that has any."""
        counts = [n for n in self.splits["train"].classes.values() if n]
        return max(counts) / min(counts) if counts else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bad": [asdict(b) for b in self.bad[:_LISTED]], "imbalance": self.imbalance}

    def lines(self) -> Iterator[str]:
        """For a person."""
        for name, split in self.splits.items():
            yield f"  {name:<10} {split.examples:,} examples{_spread(split)}"
        seen = [s for s in self.splits.values() if s.examined]
        if any(s.examined < s.examples for s in seen):
            yield f"  looked at   {', '.join(f'{s.examined:,} of {s.examples:,}' for s in seen)}"
        for what, (least, median, most, greatest) in self.splits["train"].sizes.items():
            yield f"  {what:<10} {least:,.0f} to {greatest:,.0f}, median {median:,.0f}, 95% up to {most:,.0f}"
        for name, split in self.splits.items():
            if sum(split.duplicates.values()):
                conflicts = f"; {split.conflicts:,} with different labels" if split.conflicts else ""
                exact, near = split.duplicates["exact"], split.duplicates["near"]
                yield f"  duplicates in {name}: {exact:,} equal, {near:,} nearly equal{conflicts}"
        yield from (f"  Warning: {text}" for text in self.warnings())
        if self.bad:
            yield f"  Skipped {len(self.bad):,} examples that cannot be used:"
            yield from (f"    {b.split}, {b.example}: {b.reason}" for b in self.bad[:10])
            if len(self.bad) > 10:
                yield f"    and {len(self.bad) - 10:,} more, all listed in results.json"
        if self.dropped:
            yield f"  Removed leaked examples: {', '.join(f'{n:,} from {name}' for name, n in self.dropped.items())}"

    def warnings(self) -> Iterator[str]:
        """What should be looked at before the results are believed."""
        for leak in self.leaks:
            pairs = "; ".join(f"{a} = {b}" for a, b in leak.shown)
            more = "" if self.dropped else f"; drop_leaks: true removes them from {leak.other}"
            yield (
                f"{leak.exact + leak.near:,} {leak.kept} examples are in {leak.other} too ({leak.exact:,} equal, "
                f"{leak.near:,} nearly), for example {pairs}{more}."
            )
        if self.cut and self.cut[0]:
            share, limit = self.cut
            yield f"{share:.1%} of a sample are longer than the {limit:,} tokens that are read, and are cut."
        if self.imbalance > _IMBALANCED:
            yield (
                f"the largest class has {self.imbalance:.0f} times the examples of the smallest; class_weights: auto "
                "or balanced_sampling: true make up for it."
            )
        if empty := [name for name, count in self.splits["train"].classes.items() if not count]:
            yield f"no training example of {', '.join(empty[:10])}."


def _spread(split: SplitFacts) -> str:
    if split.values:
        return f": {split.values[0]:.4g} to {split.values[2]:.4g}, mean {split.values[1]:.4g}"
    ordered = sorted(split.classes.items(), key=lambda entry: -entry[1])
    if len(ordered) > 10:
        (most, n), (least, m) = ordered[0], ordered[-1]
        return f", {len(ordered)} classes from {least} {m:,} to {most} {n:,}"
    return ": " + ", ".join(f"{name} {count:,}" for name, count in split.classes.items())


# ---- the pass over the data ----------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What the pass saw of a split: positions in it, their traces; and what is broken."""

    rows: Array
    traces: list[Trace]
    bad: dict[int, str]


def examine(
    data: Data, trace: Read, args: DataArguments, seed: int, only: Sequence[str] = _HELD_OUT_FIRST
) -> tuple[Data, Facts]:
    """(the data without what is left out, the facts).

    Under several processes the first one looks, and all leave out the same.

    Args:
        data: the splits.
        trace: the task's, from the values of an example's input columns; a `ValueError` says that it is broken.
        args: the data keys.
        seed: of the sample.
        only: the splits to look at.

    Raises:
        UserError: examples are broken, and `on_bad_example` does not skip them or they are too many.
    """
    keep, facts = _in_first_process(lambda: _examine(data, trace, args, seed, only))
    kept = {name: split.select(keep[name]) if name in keep else split for name, split in data.splits.items()}
    if empty := [name for name, split in kept.items() if not len(split)]:
        raise UserError(f"No example of the {empty[0]} split is left.", "Look at the others with drop_leaks: false.")
    return replace(data, **kept, skipped=tuple(facts.bad)), facts


def counts_only(data: Data) -> Facts:
    """The facts that need no look at the inputs."""
    return Facts({name: _counted(split, data.labels) for name, split in data.splits.items()}, bad=list(data.skipped))


def _in_first_process(work: Callable[[], Any]) -> Any:
    if not torch.distributed.is_initialized():
        return work()
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [work()]
        except UserError as error:  # the others wait for an answer
            found = [error]
    torch.distributed.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def _examine(
    data: Data, trace: Read, args: DataArguments, seed: int, only: Sequence[str]
) -> tuple[dict[str, list[int]], Facts]:
    began = time.perf_counter()
    skips = args.on_bad_example == "skip"
    limit = None if skips or args.drop_leaks else SAMPLE
    seen = {
        name: _look(data, name, trace, limit, seed, skips)
        for name in _HELD_OUT_FIRST
        if name in data.splits and name in only
    }
    bad = list(data.skipped) + [
        BadExample(data.given_split(name), _name(data, name, position), why)
        for name, look in seen.items()
        for position, why in look.bad.items()
    ]
    _check_bad(bad, sum(len(look.rows) + len(look.bad) for look in seen.values()) + len(data.skipped), args)
    facts = Facts({name: _counted(split, data.labels) for name, split in data.splits.items()}, bad=bad)
    remove = {name: set(look.bad) for name, look in seen.items()}
    _compare(data, seen, facts, remove if args.drop_leaks else None)
    keep = {name: [i for i in range(len(data.splits[name])) if i not in gone] for name, gone in remove.items() if gone}
    for name, rows in keep.items():  # counts and classes of what is left
        counted = _counted(data.splits[name].select(rows), data.labels)
        facts.splits[name].examples, facts.splits[name].classes = counted.examples, counted.classes
    facts.seconds = time.perf_counter() - began
    return keep, facts


def _look(data: Data, name: str, trace: Read, limit: int | None, seed: int, strict: bool) -> _Seen:
    split = data.splits[name]
    rows = np.arange(len(split))
    if limit is not None and len(split) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(len(split), limit, replace=False))
    inputs = undecoded(split.select(rows), data.inputs)
    found: list[Trace] = []
    bad: dict[int, str] = {}
    has_images = any(isinstance(f, Image) for f in inputs.features.values())  # decoding lets other threads run
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in inputs.iter(batch_size=_BATCH):
            values = zip(*(batch[c] for c in data.inputs), strict=True)
            for made in (pool.map if has_images else map)(lambda v: _trace(trace, v, strict), values):
                if isinstance(made, str):
                    bad[int(rows[len(found) + len(bad)])] = made
                else:
                    found.append(made)
    good = np.array([row for row in rows if int(row) not in bad], dtype=int)
    return _Seen(good, found, bad)


def _trace(trace: Read, values: Sequence[Any], strict: bool) -> Trace | str:
    """The trace, or why there is none. `strict`: bytes that were no UTF-8 were replaced when the file was read."""
    if strict and any(isinstance(v, str) and "\ufffd" in v for v in values):
        return "it is not text in UTF-8"
    try:
        return trace(values)
    except ValueError as error:
        return str(error)


def _counted(split: Dataset, labels: Labels) -> SplitFacts:
    values = split[LABELS][:]
    facts = SplitFacts(len(split))
    if labels.problem_type == REGRESSION:
        if values:
            facts.values = (min(values), float(np.mean(values)), max(values))
        return facts
    if labels.problem_type == MULTI_LABEL:
        sums = np.sum(values, axis=0) if values else np.zeros(len(labels.names))
        facts.classes = {name: int(n) for name, n in zip(labels.names, sums, strict=True)}
    else:
        counts = Counter(values)
        facts.classes = {name: counts[i] for i, name in enumerate(labels.names)}
    return facts


def _name(data: Data, name: str, position: int) -> str:
    """An example as its owner knows it: the picture's file, or the row of the data as given."""
    row = data.splits[name].select([position]).select_columns([data.inputs[0], ROW])
    if isinstance(row.features[data.inputs[0]], Image):
        row = row.cast_column(data.inputs[0], Image(decode=False))
    found = row[0]
    cell = found[data.inputs[0]]
    path = cell.get("path") if isinstance(cell, dict) else None
    text = f" ({cell[:40]!r})" if isinstance(cell, str) and cell.strip() else ""
    return Path(path).name + f" (row {found[ROW]})" if path else f"row {found[ROW]}{text}"


def _check_bad(bad: Sequence[BadExample], total: int, args: DataArguments) -> None:
    """Raises:
    UserError: there are broken examples, and they are not skipped or too many.
    """
    if not bad:
        return
    listed = "; ".join(f"{b.split}, {b.example}: {b.reason}" for b in bad[:_SHOWN])
    some = f"{len(bad):,} of {total:,} examples cannot be used: {listed}{'; …' if len(bad) > _SHOWN else ''}."
    if args.on_bad_example != "skip":
        raise UserError(some, "Mend or remove them, or leave them out with on_bad_example: skip.")
    if len(bad) > args.max_bad_fraction * total:
        raise UserError(
            f"max_bad_fraction: {some}",
            f"That is more than {args.max_bad_fraction:.3g} of them. Look at the data, or raise max_bad_fraction.",
        )


# ---- comparisons ---------------------------------------------------------------------------------------------------


def _compare(data: Data, seen: dict[str, _Seen], facts: Facts, remove: dict[str, set[int]] | None) -> None:
    """Fill in duplicates and leaks; where `remove` is given, add to it what leaks, from the earlier split of a pair."""
    names = [name for name in _HELD_OUT_FIRST if name in seen]
    traces = [t for name in names for t in seen[name].traces]
    if not traces:
        return
    all_traces = Traces.of(traces)
    same, alike = all_traces.same(), all_traces.alike()
    ends = np.cumsum([len(seen[name].traces) for name in names])
    parts = {name: slice(end - len(seen[name].traces), end) for name, end in zip(names, ends, strict=True)}
    for name in names:
        own, look = facts.splits[name], seen[name]
        own.examined = len(look.rows) + len(look.bad)
        measured = sorted({key for t in look.traces for key in t.sizes})
        own.sizes = {k: _quantiles([t.sizes[k] for t in look.traces]) for k in measured}
        exact = len(look.rows) - len(np.unique(same[parts[name]]))
        own.duplicates = {"exact": exact, "near": len(look.rows) - len(np.unique(alike[parts[name]])) - exact}
        labels = [str(v) for v in data.splits[name].select(look.rows)[LABELS][:]]
        own.conflicts = _conflicts(alike[parts[name]], labels)
    for kept, other in combinations(names, 2):
        _add_leak(data, seen, facts, (kept, other), (parts[kept], parts[other]), (same, alike), remove)


def _quantiles(values: list[int]) -> tuple[float, ...]:
    return tuple(float(v) for v in np.percentile(values, [0, 50, 95, 100]))


def _conflicts(alike: Array, labels: list[str]) -> int:
    kinds: dict[int, Counter[str]] = {}
    for number, label in zip(alike.tolist(), labels, strict=True):
        kinds.setdefault(number, Counter())[label] += 1
    return sum(sum(c.values()) for c in kinds.values() if len(c) > 1)


def _add_leak(
    data: Data,
    seen: dict[str, _Seen],
    facts: Facts,
    names: tuple[str, str],
    parts: tuple[slice, slice],
    numbers: tuple[Array, Array],
    remove: dict[str, set[int]] | None,
) -> None:
    (kept, other), (same, alike) = names, numbers
    leaked = np.isin(alike[parts[0]], alike[parts[1]])
    if not leaked.any():
        return
    exact = int(np.isin(same[parts[0]], same[parts[1]]).sum())
    first = {number: i for i, number in reversed(list(enumerate(alike[parts[1]].tolist())))}
    shown = []
    for i in np.flatnonzero(leaked)[:_SHOWN]:
        twin = first[int(alike[parts[0]][i])]
        shown.append(
            (
                _name(data, kept, int(seen[kept].rows[i])),
                _name(data, other, int(seen[other].rows[twin])),
            )
        )
    facts.leaks.append(Leak(kept, other, exact, int(leaked.sum()) - exact, shown))
    if remove is not None:
        gone = seen[other].rows[np.isin(alike[parts[1]], alike[parts[0]])].tolist()
        before = len(remove[other])
        remove[other] |= set(gone)
        facts.dropped[other] = facts.dropped.get(other, 0) + len(remove[other]) - before
