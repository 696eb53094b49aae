"""One pass over the inputs before training: find bad examples, duplicates and leaks, and drop what the keys say.

At most `SAMPLE` examples of each split are examined. With `on_bad_example: skip` or `drop_leaks` all of them are,
because an example that was not examined cannot be dropped.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed
from datasets import Dataset, Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.duplicates import Trace
from hf_transfer.data.facts import Facts, SplitFacts
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, MULTI_LABEL, REGRESSION, Labels
from hf_transfer.data.leaks import HELD_OUT_FIRST, ExaminedSplit, compare
from hf_transfer.data.raw import BadExample
from hf_transfer.data.splits import Data, name_of, with_every_class
from hf_transfer.errors import UserError

SAMPLE = 100_000
_BATCH = 256
_MAX_SHOWN = 3  # bad examples in an error message
TraceFunction = Callable[[Sequence[Any]], Trace]


def examine(
    data: Data, trace: TraceFunction, args: DataArguments, seed: int, only: Sequence[str] = HELD_OUT_FIRST
) -> tuple[Data, Facts]:
    """Examine the splits and drop bad and leaked examples.

    In a distributed run rank 0 examines the data, and every rank drops the same examples.

    Args:
        data: the splits.
        trace: the task's `trace`, called with the values of an example's input columns; it raises `ValueError` for an
            unusable example.
        args: data keys.
        seed: seed of the sample.
        only: names of the splits to examine.

    Returns:
        The data without the dropped examples, and what was found out about it.

    Raises:
        UserError: there are bad examples and `on_bad_example` is not `skip`, there are more of them than
            `max_bad_fraction` allows, or a split would be empty.
    """
    keep, facts = _on_rank_zero(lambda: _examine(data, trace, args, seed, only))
    kept = {name: split.select(keep[name]) if name in keep else split for name, split in data.splits.items()}
    if empty := [name for name, split in kept.items() if not len(split)]:
        bad = next((b.reason for b in facts.bad if b.split == data.given_split(empty[0])), "")
        raise UserError(
            f"No examples are left in the {empty[0]} split{f' (the first left out: {bad})' if bad else ''}.",
            "Set drop_leaks: false to keep examples that appear in several splits." if args.drop_leaks else "",
        )
    usable = replace(data, **kept, skipped=tuple(facts.bad))
    whole = with_every_class(usable, args.split_group_column_name)
    if whole is not usable:
        for name in ("train", "validation"):
            counts = _counts(whole.splits[name], whole.labels)
            facts.splits[name].examples, facts.splits[name].classes = counts.examples, counts.classes
    return whole, facts


def without_bad(
    split: Dataset,
    name: str,
    inputs: tuple[str, ...],
    trace: TraceFunction,
    args: DataArguments,
    skipped: Sequence[BadExample] = (),
) -> tuple[Dataset, list[BadExample]]:
    """(a split of other data without the examples that training would not use, all examples left out).

    Args:
        split: with encoded labels.
        name: of the split.
        inputs: names of the input columns.
        trace: the task's `trace`.
        args: data keys.
        skipped: examples that were left out before, because of their labels.

    Raises:
        UserError: there are bad examples and `on_bad_example` is not `skip`, there are more of them than
            `max_bad_fraction` allows, or no example is left.
    """
    skips = args.on_bad_example == "skip"
    examined = _examine_split(split, inputs, trace, None if skips else SAMPLE, 0)
    bad = [BadExample(name, name_of(split, inputs, i), reason) for i, reason in examined.bad.items()]
    bad = [*skipped, *bad]
    if bad and len(examined.bad) == len(split):
        raise UserError(f"No usable examples in the {name} split (the first one: {bad[0].reason}).")
    _check_bad(bad, len(split) + len(skipped), args)
    return split.select([i for i in range(len(split)) if i not in examined.bad]) if examined.bad else split, bad


def counts_only(data: Data) -> Facts:
    """The facts that do not require reading the inputs."""
    return Facts({name: _counts(split, data.labels) for name, split in data.splits.items()}, bad=list(data.skipped))


def _on_rank_zero(work: Callable[[], Any]) -> Any:
    """The result of `work` on rank 0, on every rank; a `UserError` is raised on every rank."""
    if not torch.distributed.is_initialized():
        return work()
    result: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            result = [work()]
        except UserError as error:  # the other ranks wait for a broadcast
            result = [error]
    torch.distributed.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def _examine(
    data: Data, trace: TraceFunction, args: DataArguments, seed: int, only: Sequence[str]
) -> tuple[dict[str, list[int]], Facts]:
    """(positions to keep in each split that loses examples, the facts)."""
    start = time.perf_counter()
    skips = args.on_bad_example == "skip"
    limit = None if skips or args.drop_leaks else SAMPLE
    examined = {
        name: _examine_split(data.splits[name], data.inputs, trace, limit, seed)
        for name in HELD_OUT_FIRST
        if name in data.splits and name in only
    }
    bad = list(data.skipped) + [
        BadExample(data.given_split(name), data.name_of(name, position), reason)
        for name, split in examined.items()
        for position, reason in split.bad.items()
    ]
    _check_bad(bad, sum(len(s.rows) + len(s.bad) for s in examined.values()) + len(data.skipped), args)
    facts = Facts({name: _counts(split, data.labels) for name, split in data.splits.items()}, bad=bad)
    remove = {name: set(split.bad) for name, split in examined.items()}
    compare(data, examined, facts, remove if args.drop_leaks else None)
    keep = {name: [i for i in range(len(data.splits[name])) if i not in gone] for name, gone in remove.items() if gone}
    for name, rows in keep.items():
        counts = _counts(data.splits[name].select(rows), data.labels)
        facts.splits[name].examples, facts.splits[name].classes = counts.examples, counts.classes
    facts.seconds = time.perf_counter() - start
    return keep, facts


def _examine_split(
    split: Dataset, inputs: Sequence[str], trace: TraceFunction, limit: int | None, seed: int
) -> ExaminedSplit:
    rows = np.arange(len(split))
    if limit is not None and len(split) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(len(split), limit, replace=False))
    examples = undecoded(split.select(rows), inputs)
    traces: list[Trace] = []
    bad: dict[int, str] = {}
    has_images = any(isinstance(f, Image) for f in examples.features.values())  # decoding releases the GIL
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in examples.iter(batch_size=_BATCH):
            values = zip(*(batch[c] for c in inputs), strict=True)
            for result in (pool.map if has_images else map)(lambda v: _trace(trace, v), values):
                if isinstance(result, str):
                    bad[int(rows[len(traces) + len(bad)])] = result
                else:
                    traces.append(result)
    usable = np.array([row for row in rows if int(row) not in bad], dtype=int)
    return ExaminedSplit(usable, traces, bad)


def _trace(trace: TraceFunction, values: Sequence[Any]) -> Trace | str:
    """The trace of an example, or the reason why it is unusable."""
    try:
        return trace(values)
    except ValueError as error:
        return str(error)


def _counts(split: Dataset, labels: Labels) -> SplitFacts:
    """Number of examples, and the distribution of the labels."""
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


def _check_bad(bad: Sequence[BadExample], total: int, args: DataArguments) -> None:
    """Stop if bad examples may not be skipped.

    Raises:
        UserError: `on_bad_example` is not `skip`, or more than `max_bad_fraction` of the `total` examples are bad.
    """
    if not bad:
        return
    listed = "; ".join(f"{b.split}, {b.example}: {b.reason}" for b in bad[:_MAX_SHOWN])
    message = f"{len(bad):,} of {total:,} examples are unusable: {listed}{'; …' if len(bad) > _MAX_SHOWN else ''}."
    if args.on_bad_example != "skip":
        raise UserError(message, "Fix or remove them, or set on_bad_example: skip to leave them out.")
    if len(bad) > args.max_bad_fraction * total:
        raise UserError(
            f"max_bad_fraction: {message}",
            f"That is more than the allowed fraction of {args.max_bad_fraction:.3g}. Check the data, or raise "
            "max_bad_fraction.",
        )
