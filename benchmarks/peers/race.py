"""A race: ways to train ("sides") on the same data and seeds, interleaved, with a table of what each claim is worth.

A round is a seed: all sides train on the same examples from the same weights, in an order that is drawn for the round.
Before the first round each side trains once on a few examples, uncounted. The clock of a side runs from raw examples
and a loaded model to the trained model; the accuracy on held-out examples is measured afterwards, by the same code.

Every outcome is written at once and kept: a run that was killed goes on, outcomes with other settings stay in the
file and are not counted, and the table is made from what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from scipy import stats

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "timm", "scikit-learn", "fastai")
WARM_UP = 32  # examples
MARGIN = 0.5  # points of accuracy that ours may lose
COLUMNS = (
    "ours",
    "peer",
    "n",
    "seconds",
    "ratio",
    "from to",
    "CPU",
    "at least",
    "arithmetic",
    "accuracy",
    "difference",
    "reached",
)

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A way to train.

    Attributes:
        key: its name on the command line.
        name: its name in the table.
        run: (seed, options) to an outcome: at least `seconds`, `cpu_seconds` and `accuracy`.
        slow: only timed with `--slow_seeds`.
        missing: why it cannot run here; None where it can.
    """

    key: str
    name: str
    run: Callable[[int, argparse.Namespace], Outcome]
    slow: bool = False
    missing: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Claim:
    """One side beside another: how many times as long the other takes.

    Attributes:
        ours: key of a side.
        peer: key of a side.
        at_least: the ratio that is aimed for; None: only reported.
        limit: what arithmetic allows at the default sizes.
    """

    ours: str
    peer: str
    at_least: float | None = None
    limit: str = ""


@dataclass(frozen=True)
class Race:
    """A script's whole content.

    Attributes:
        name: of the script and its results.
        title: of the table.
        about: sentences under it: model, data, rates, what the clock covers.
        sides: ours first.
        claims: rows of the table.
        examples: to train on.
        epochs: of every side.
        settings: what else an outcome depends on.
        slow_seeds: of the slow sides.
        add_options: more options of the command line; their values are settings.
    """

    name: str
    title: str
    about: Sequence[str]
    sides: Sequence[Side]
    claims: Sequence[Claim]
    examples: int = 512
    epochs: int = 10
    held_out: int = 1000
    settings: dict[str, Any] = field(default_factory=dict)
    slow_seeds: Sequence[int] = (0, 1)
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


class Clock:
    """Seconds of wall and of all threads of this process within a `with`."""

    def __enter__(self) -> Clock:
        gc.collect()  # what the side before left
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began[0]
        self.cpu_seconds = time.process_time() - self._began[1]

    @property
    def outcome(self) -> Outcome:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


class Book:
    """Outcomes, written after each: a list of {side, seed, settings, outcome}."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def find(self, side: str, seed: int) -> Outcome | None:
        """The outcome with these settings."""
        found = [r["outcome"] for r in self.rows if self._is(r, side, seed)]
        return found[-1] if found else None

    def add(self, side: str, seed: int, outcome: Outcome) -> None:
        self.rows = [r for r in self.rows if not self._is(r, side, seed)]
        self.rows.append({"side": side, "seed": seed, "settings": self.settings, "outcome": outcome})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        beside.replace(self.path)

    def _is(self, row: dict[str, Any], side: str, seed: int) -> bool:
        return (row["side"], row["seed"], row["settings"]) == (side, seed, self.settings)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """No bars and warnings; nothing of `Dataset.map` is kept, or the second to tokenise would find it done."""
    caching, bars = datasets.is_caching_enabled(), not datasets.are_progress_bars_disabled()
    verbosity, loading = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if caching:
            datasets.enable_caching()
        if bars:
            datasets.enable_progress_bars()
        transformers.logging.set_verbosity(verbosity)
        if loading:
            transformers.logging.enable_progress_bar()


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model na")]
        model = names[0] if names else model
    found: dict[str, Any] = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def difference(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the paired differences: a 95% interval by Student's t; of one pair, not bounded."""
    pairs = [a - b for a, b in zip(ours, peer, strict=True)]
    mean = statistics.mean(pairs)
    if len(pairs) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return mean, mean - half, mean + half


def compare(race: Race, book: Book, claim: Claim, seeds: Sequence[int]) -> dict[str, Any] | None:
    """What the seeds that both sides have say of a claim; None where there are none."""
    found = [(book.find(claim.ours, s), book.find(claim.peer, s)) for s in seeds]
    both = [(a, b) for a, b in found if a is not None and b is not None]
    if not both:
        return None
    ratios = [b["seconds"] / a["seconds"] for a, b in both]
    cpu = [b["cpu_seconds"] / max(a["cpu_seconds"], 1e-9) for a, b in both]
    points = [[100 * one["accuracy"] for one in side] for side in zip(*both, strict=True)]
    mean, low, high = difference(points[0], points[1])
    ratio = statistics.median(ratios)
    return {
        "seeds": len(both),
        "seconds": [statistics.median(one["seconds"] for one in side) for side in zip(*both, strict=True)],
        "ratio": ratio,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_cpu": statistics.median(cpu),
        "accuracy": [statistics.mean(side) for side in points],
        "difference": mean,
        "interval": [low, high],
        "reached": None if claim.at_least is None else ratio >= claim.at_least and mean >= -MARGIN,
    }


def table(race: Race, book: Book, options: argparse.Namespace) -> str:
    """The Markdown page of a race."""
    names = {side.key: side.name for side in race.sides}
    usual = options.examples == race.examples and options.epochs == race.epochs
    lines = [
        f"# {race.title}",
        "",
        f"`python benchmarks/{race.name}.py`, {time.strftime('%Y-%m-%d')}: "
        f"{', '.join(f'{k} {v}' for k, v in machine().items())}; {torch.get_num_threads()} threads, fp32.",
        "",
        *race.about,
        f"{options.examples} training and {options.held_out} held-out examples, {options.epochs} epochs, the same for "
        "all sides.",
        "",
        "Ratio: the peer's wall time by ours, the median over seeds, lowest and highest; CPU: the same of the time of",
        "all threads. Loading of weights is outside of the clock on all sides, and so is the evaluation that follows.",
        "Accuracy: mean over seeds, in percent; difference: ours less the peer's, with its paired 95% interval (t).",
        f"Reached: the ratio is, and the mean is not lower by more than {MARGIN} points. n: seeds that both have.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for claim in race.claims:
        r = compare(race, book, claim, options.seeds)
        if r is None:
            continue
        aim, limit = (claim.at_least, claim.limit) if usual else (None, "")
        reached = "–" if aim is None else "yes" if r["reached"] else "no"
        interval = f" ({r['interval'][0]:+.2f} to {r['interval'][1]:+.2f})" if r["seeds"] > 1 else ""
        lines.append(
            f"| {names[claim.ours]} | {names[claim.peer]} | {r['seeds']} "
            f"| {r['seconds'][0]:.1f}, {r['seconds'][1]:.1f} "
            f"| {r['ratio']:.2f} | {r['ratio_min']:.2f} to {r['ratio_max']:.2f} | {r['ratio_cpu']:.2f} "
            f"| {aim or '–'} | {limit or '–'} | {r['accuracy'][0]:.1f}, {r['accuracy'][1]:.1f} "
            f"| {r['difference']:+.2f}{interval} | {reached} |"
        )
    return "\n".join([*lines, "", *each_side(race, book, options.seeds), ""])


def each_side(race: Race, book: Book, seeds: Sequence[int]) -> list[str]:
    """A row per side: seconds and accuracy of every seed, and the share of padding where it was counted."""
    lines = ["| side | seconds | accuracy | trained parameters | padding |", "|---|---|---|---|---|"]
    for side in race.sides:
        found = [o for o in (book.find(side.key, seed) for seed in seeds) if o is not None]
        if not found:
            continue
        seconds = ", ".join(format(o["seconds"], ".1f") for o in found)
        accuracy = ", ".join(format(100 * o["accuracy"], ".1f") for o in found)
        padding = [o["padding"] for o in found if o.get("padding") is not None]
        share = f"{100 * statistics.mean(padding):.0f}%" if padding else "–"
        lines.append(f"| {side.name} | {seconds} | {accuracy} | {found[0].get('trained', '–')} | {share} |")
    return lines


def parser_of(race: Race) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": lambda text: [int(n) for n in text.split(",")]}
    parser.add_argument("--examples", type=int, default=race.examples, help="to train on")
    parser.add_argument("--epochs", type=int, default=race.epochs)
    parser.add_argument("--held_out", type=int, default=race.held_out, help="examples that accuracy is measured on")
    parser.add_argument("--seeds", default=[0, 1, 2, 3, 4], **numbers)
    parser.add_argument("--slow_seeds", default=list(race.slow_seeds), help="of the slow sides", **numbers)
    parser.add_argument("--peers", type=lambda text: text.split(","), help="sides to run beside ours; default: all")
    parser.add_argument("--again", action="store_true", help="also run what has an outcome with these settings")
    parser.add_argument("--table", action="store_true", help="run nothing, make the table from what there is")
    parser.add_argument("--quick", action="store_true", help="a few examples, one seed; results go nowhere")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    race.add_options(parser)
    return parser


def run(race: Race, options: argparse.Namespace) -> Book:
    """All rounds; returns what is in the book then."""
    ours = {claim.ours for claim in race.claims}
    chosen = [s for s in race.sides if options.peers is None or s.key in (*ours, *options.peers)]
    unknown = set(options.peers or ()) - {s.key for s in race.sides}
    if unknown:
        raise SystemExit(f"--peers: {', '.join(sorted(unknown))}; there are {', '.join(s.key for s in race.sides)}.")
    apart = ("seeds", "slow_seeds", "peers", "again", "table", "quick", "results")
    settings = {k: v for k, v in vars(options).items() if k not in apart}
    book = Book(
        options.results / f"{race.name}.json", {**race.settings, **settings, "threads": torch.get_num_threads()}
    )
    if options.table:
        return book
    present = []
    for side in chosen:
        reason = side.missing()
        if reason:
            print(f"{side.name}: left out, {reason}", flush=True)
        else:
            present.append(side)
    todo = [(seed, s) for seed in options.seeds for s in _drawn(present, seed) if _wanted(book, s, seed, options)]
    small = argparse.Namespace(**{**vars(options), "examples": WARM_UP, "held_out": WARM_UP})
    for side in [s for s in present if any(s is other for _, other in todo)]:
        side.run(0, small)
    for seed, side in todo:
        load = os.getloadavg()[0]
        outcome = side.run(seed, options)
        book.add(side.key, seed, {**outcome, "load": load, "machine": machine(), "date": time.strftime("%Y-%m-%d")})
        print(
            f"{side.name}, seed {seed}: {outcome['seconds']:.1f} s, accuracy {100 * outcome['accuracy']:.1f}",
            flush=True,
        )
    return book


def _drawn(sides: Sequence[Side], seed: int) -> list[Side]:
    return random.Random(seed).sample(list(sides), len(sides))


def _wanted(book: Book, side: Side, seed: int, options: argparse.Namespace) -> bool:
    if side.slow and seed not in options.slow_seeds:
        return False
    return options.again or book.find(side.key, seed) is None


def main(race: Race, arguments: Sequence[str] | None = None) -> str:
    """The script: runs what is missing, prints the table and writes it."""
    options = parser_of(race).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, settled():
        if options.quick:
            options.examples, options.held_out, options.seeds = 64, 64, options.seeds[:1]
            options.epochs = min(options.epochs, 3)
            options.results = Path(folder)
        page = table(race, run(race, options), options)
        print(page)
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / f"{race.name}.md").write_text(page)
    return page
