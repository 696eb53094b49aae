"""Variants of one label: names that differ in case, spaces or Unicode form alone."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

import datasets
from datasets import ClassLabel, Dataset, Value

from hf_transfer.data.label_cells import is_missing
from hf_transfer.data.labels import REGRESSION, Labels
from hf_transfer.data.raw import RawSplits, changed


def variant_key(name: str) -> str:
    """What variants of one name share: they differ in case, spaces, Unicode form or invisible characters alone."""
    visible = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join("".join(visible).casefold().split())


def variants(counts: Mapping[str, int]) -> list[dict[str, int]]:
    """Groups of names that are variants of one another, each with its counts, the most frequent first."""
    groups: dict[str, dict[str, int]] = {}
    for name, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        groups.setdefault(variant_key(name), {})[name] = count
    return [group for group in groups.values() if len(group) > 1]


def standard_names(names: Sequence[str]) -> dict[str, str]:
    """For each key of `variant_key` the first of `names` that has it."""
    standard: dict[str, str] = {}
    for name in names:
        standard.setdefault(variant_key(name), name)
    return standard


def merged(raw: RawSplits, column: str, known: Labels | None) -> RawSplits:
    """The splits with one name for all variants of a label: the model's, else the most frequent in training."""
    raw = raw.but({n: _as_names(s, column) for n, s in raw.items()})
    counts = _name_counts(raw.main, column)
    standard = standard_names(known.names if known else sorted(counts, key=lambda n: (-counts[n], n)))
    rename = lambda v: standard.get(variant_key(v), v) if isinstance(v, str) else v  # noqa: E731
    read = lambda v: list(dict.fromkeys(map(rename, v))) if isinstance(v, list) else rename(v)  # noqa: E731
    if not known:
        for group in variants(counts):
            raw.notes.append(f"Labels merged into {next(iter(group))!r}: {_counted(group)}.")
    return raw.but({n: changed(s, column, read, s.features.get(column)) for n, s in raw.items()})


def variant_notes(raw: RawSplits, column: str, labels: Labels) -> list[str]:
    """Notes about labels that seem to be variants of one another."""
    if labels.problem_type == REGRESSION:
        return []
    counts = _name_counts(_as_names(raw.main, column), column)
    return [
        f"Labels that differ in case, spaces or Unicode form alone: {_counted(group)}. "
        "merge_label_variants: true makes them one."
        for group in variants({name: counts[name] for name in labels.names})
    ]


def _counted(group: Mapping[str, int]) -> str:
    return ", ".join(f"{name!r} {count:,}" for name, count in group.items())


def _name_counts(split: Dataset, column: str) -> Counter[str]:
    cells = [v if isinstance(v, list) else [v] for v in split[column][:] if not is_missing(v)]
    return Counter(str(x) for cell in cells for x in cell)


def _as_names(split: Dataset, column: str) -> Dataset:
    """`split` with names in place of the numbers of a class feature."""
    feature = split.features.get(column)
    inner = getattr(feature, "feature", None) or feature
    if not isinstance(inner, ClassLabel):
        return split
    name = lambda i: inner.int2str(i) if i is not None and i >= 0 else None  # noqa: E731
    if inner is feature:
        return changed(split, column, name, Value("string"))
    return changed(split, column, lambda v: None if v is None else list(map(name, v)), datasets.List(Value("string")))
