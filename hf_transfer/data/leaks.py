"""Duplicates within a split, and examples shared between splits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hf_transfer.data.duplicates import Array, Trace, Traces
from hf_transfer.data.facts import Facts, Leak
from hf_transfer.data.labels import LABELS
from hf_transfer.data.splits import Data

HELD_OUT_FIRST = ("test", "validation", "train")
_MAX_SHOWN = 3  # example pairs per leak


@dataclass
class ExaminedSplit:
    """What one pass over a split collected.

    Attributes:
        rows: (usable,) positions of the usable examples in the split.
        traces: their hashes and sizes, in the same order.
        bad: position of each unusable example, and what is wrong with it.
    """

    rows: Array
    traces: list[Trace]
    bad: dict[int, str]


def compare(data: Data, examined: dict[str, ExaminedSplit], facts: Facts, remove: dict[str, set[int]] | None) -> None:
    """Fill in the sizes, duplicates and leaks of `facts`.

    Args:
        data: the splits.
        examined: what was collected from each examined split.
        facts: the record to fill in.
        remove: positions to drop from each split. Leaked examples of the earlier split of each pair are added;
            None records leaks without dropping anything.
    """
    names = [name for name in HELD_OUT_FIRST if name in examined]
    traces = [t for name in names for t in examined[name].traces]
    if not traces:
        return
    all_traces = Traces.of(traces)
    exact_ids, near_ids = all_traces.same(), all_traces.alike()
    ends = np.cumsum([len(examined[name].traces) for name in names])
    parts = {name: slice(end - len(examined[name].traces), end) for name, end in zip(names, ends, strict=True)}
    for name in names:
        split_facts, split = facts.splits[name], examined[name]
        split_facts.examined = len(split.rows) + len(split.bad)
        measured = sorted({key for t in split.traces for key in t.sizes})
        split_facts.sizes = {k: _quantiles([t.sizes[k] for t in split.traces]) for k in measured}
        exact = len(split.rows) - len(np.unique(exact_ids[parts[name]]))
        near = len(split.rows) - len(np.unique(near_ids[parts[name]])) - exact
        split_facts.duplicates = {"exact": exact, "near": near}
        labels = [str(v) for v in data.splits[name].select(split.rows)[LABELS][:]]
        split_facts.conflicts = _conflicts(near_ids[parts[name]], labels)
    for kept, other in combinations(names, 2):
        _add_leak(data, examined, facts, (kept, other), (parts[kept], parts[other]), (exact_ids, near_ids), remove)


def _quantiles(values: list[int]) -> tuple[float, ...]:
    return tuple(float(v) for v in np.percentile(values, [0, 50, 95, 100]))


def _conflicts(near_ids: Array, labels: list[str]) -> int:
    """Number of examples in sets of duplicates that do not all have the same label."""
    labels_of: dict[int, Counter[str]] = {}
    for number, label in zip(near_ids.tolist(), labels, strict=True):
        labels_of.setdefault(number, Counter())[label] += 1
    return sum(sum(c.values()) for c in labels_of.values() if len(c) > 1)


def _add_leak(
    data: Data,
    examined: dict[str, ExaminedSplit],
    facts: Facts,
    names: tuple[str, str],
    parts: tuple[slice, slice],
    ids: tuple[Array, Array],
    remove: dict[str, set[int]] | None,
) -> None:
    """Record the examples that a pair of splits shares; see `compare`."""
    (kept, other), (exact_ids, near_ids) = names, ids
    leaked = np.isin(near_ids[parts[0]], near_ids[parts[1]])
    if not leaked.any():
        return
    exact = int(np.isin(exact_ids[parts[0]], exact_ids[parts[1]]).sum())
    first = {number: i for i, number in reversed(list(enumerate(near_ids[parts[1]].tolist())))}
    shown = []
    for i in np.flatnonzero(leaked)[:_MAX_SHOWN]:
        twin = first[int(near_ids[parts[0]][i])]
        shown.append(
            (
                data.name_of(kept, int(examined[kept].rows[i])),
                data.name_of(other, int(examined[other].rows[twin])),
            )
        )
    facts.leaks.append(Leak(kept, other, exact, int(leaked.sum()) - exact, shown))
    if remove is not None:
        before = len(remove[other])
        remove[other].update(examined[other].rows[np.isin(near_ids[parts[1]], near_ids[parts[0]])].tolist())
        facts.dropped[other] = facts.dropped.get(other, 0) + len(remove[other]) - before
