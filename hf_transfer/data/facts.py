"""What is reported about the data before training: counts, sizes, duplicates, leaks between splits and bad examples.

`hf_transfer.data.examine` fills these records in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_transfer.data.groups import GroupLeak
from hf_transfer.data.raw import BadExample
from hf_transfer.errors import named, shortened

_MAX_LISTED = 1000  # bad examples listed in `to_dict`
_MAX_PRINTED = 10  # bad examples or class names printed
_IMBALANCED = 10.0


@dataclass
class SplitFacts:
    """Statistics of one split.

    Attributes:
        examples: number of examples.
        examined: how many of them were examined.
        classes: examples per class; empty for regression.
        values: (minimum, mean, maximum) of a regression target; empty for classification.
        sizes: (minimum, median, 95th percentile, maximum) of each measured input size, e.g. characters or pixels.
        duplicates: number of `exact` and `near` duplicates, not counting the first example of each set.
        conflicts: examples that have an exact or near-duplicate with a different label.
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
    """Examples of one split that also appear in another.

    Attributes:
        kept: the later split (test before validation before train), which keeps its examples.
        other: the earlier split, from which `drop_leaks` removes them.
        exact: examples of `kept` with an exact duplicate in `other`.
        near: further examples of `kept` with a near-duplicate in `other`.
        shown: a few pairs (example of `kept`, example of `other`).
    """

    kept: str
    other: str
    exact: int
    near: int
    shown: list[tuple[str, str]]


@dataclass
class PixelFacts:
    """The range of float and 32-bit images.

    Attributes:
        range: (lowest, highest) value, which become black and white.
        deep: number of such images in each split.
        clipped: number of them with values beyond the range, which are clipped.
    """

    range: tuple[float, float]
    deep: dict[str, int]
    clipped: dict[str, int]


@dataclass(frozen=True)
class Misfit:
    """Something of the input that the checkpoint was not made for.

    Attributes:
        measure: what was measured on a sample.
        value: of it.
        limit: above which it does not fit.
        text: for display, with what to do.
    """

    measure: str
    value: float
    limit: float
    text: str


@dataclass
class Facts:
    """Everything `train` and `plan` report about the data before training.

    Attributes:
        splits: statistics of each split.
        leaks: examples shared between splits.
        bad: unusable examples, all of them skipped.
        dropped: number of leaked examples removed from each split.
        group_leaks: groups with examples in several splits, see `split_group_column_name`.
        cut: (fraction of a sample of texts that is truncated, maximum length in tokens); None if nothing is truncated.
        decided: how the data was read: what each column is taken for, and whatever its files left open.
        pixels: range of float and 32-bit images; None if there are none.
        misfits: what of the input the checkpoint was not made for.
        seconds: time spent examining the data.
    """

    splits: dict[str, SplitFacts]
    leaks: list[Leak] = field(default_factory=list)
    bad: list[BadExample] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    group_leaks: list[GroupLeak] = field(default_factory=list)
    cut: tuple[float, int] | None = None
    decided: list[str] = field(default_factory=list)
    pixels: PixelFacts | None = None
    misfits: list[Misfit] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def imbalance(self) -> float:
        """Ratio of the largest training class to the smallest non-empty one."""
        counts = [n for n in self.splits["train"].classes.values() if n]
        return max(counts) / min(counts) if counts else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return {**asdict(self), "bad": [asdict(b) for b in self.bad[:_MAX_LISTED]], "imbalance": self.imbalance}

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        yield from (f"  {text}" for text in self.decided)
        for name, split in self.splits.items():
            yield f"  {name:<10} {split.examples:,} examples{_distribution(split)}"
        examined = [s for s in self.splits.values() if s.examined]
        if any(s.examined < s.examples for s in examined):
            yield f"  examined   {', '.join(f'{s.examined:,} of {s.examples:,}' for s in examined)}"
        for size, (low, median, p95, high) in self.splits["train"].sizes.items():
            yield f"  {size:<10} {low:,.0f} to {high:,.0f}, median {median:,.0f}, 95th percentile {p95:,.0f}"
        if self.pixels:
            (low, high), deep = self.pixels.range, _counts(self.pixels.deep)
            yield f"  pixels     {low:g} to {high:g} in float and 32-bit images ({deep}), for every image alike"
        for name, split in self.splits.items():
            if sum(split.duplicates.values()):
                conflicts = f"; {split.conflicts:,} with conflicting labels" if split.conflicts else ""
                exact, near = split.duplicates["exact"], split.duplicates["near"]
                yield f"  duplicates in {name}: {exact:,} exact, {near:,} near{conflicts}"
        yield from (f"  Warning: {text}" for text in self.warnings())
        if self.bad:
            yield f"  Skipped {len(self.bad):,} unusable examples:"
            yield from (f"    {b.split}, {b.example}: {b.reason}" for b in self.bad[:_MAX_PRINTED])
            if len(self.bad) > _MAX_PRINTED:
                yield f"    and {len(self.bad) - _MAX_PRINTED:,} more, listed in results.json"
        if self.dropped:
            yield f"  Removed leaked examples: {', '.join(f'{n:,} from {name}' for name, n in self.dropped.items())}"

    def warnings(self) -> Iterator[str]:
        """Problems to look into before trusting the results."""
        for leak in self.leaks:
            pairs = "; ".join(f"{a} = {b}" for a, b in leak.shown)
            fix = "" if self.dropped else f"; drop_leaks: true removes them from {leak.other}"
            yield (
                f"{leak.exact + leak.near:,} {leak.kept} examples also appear in {leak.other} ({leak.exact:,} exact, "
                f"{leak.near:,} near-duplicates), for example {pairs}{fix}."
            )
        for group_leak in self.group_leaks:
            yield (
                f"{group_leak.groups:,} values of split_group_column_name occur in both {group_leak.kept} and "
                f"{group_leak.other} ({group_leak.examples:,} {group_leak.kept} examples), for example "
                f"{', '.join(group_leak.shown)}; the data makes these splits, so they are left as they are."
            )
        yield from (misfit.text for misfit in self.misfits)
        if self.cut and self.cut[0]:
            fraction, limit = self.cut
            yield f"{fraction:.1%} of sampled texts exceed the maximum length of {limit:,} tokens and are truncated."
        if self.pixels and any(self.pixels.clipped.values()):
            low, high = self.pixels.range
            yield f"images with values beyond {low:g} to {high:g}, which are clipped: {_counts(self.pixels.clipped)}."
        if self.imbalance > _IMBALANCED:
            yield (
                f"the largest class has {self.imbalance:.0f} times as many examples as the smallest; class_weights: "
                "auto or balanced_sampling: true compensates for it."
            )
        if empty := [name for name, count in self.splits["train"].classes.items() if not count]:
            yield f"no training examples for {named(empty, _MAX_PRINTED)}."


def _counts(of_splits: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in of_splits.items() if n)


def _distribution(split: SplitFacts) -> str:
    if split.values:
        return f": {split.values[0]:.4g} to {split.values[2]:.4g}, mean {split.values[1]:.4g}"
    by_count = sorted(split.classes.items(), key=lambda entry: -entry[1])
    if len(by_count) > _MAX_PRINTED:
        (largest, most), (smallest, fewest) = by_count[0], by_count[-1]
        return f", {len(by_count)} classes, from {fewest:,} ({shortened(smallest)}) to {most:,} ({shortened(largest)})"
    return ": " + ", ".join(f"{shortened(name)} {count:,}" for name, count in split.classes.items())
