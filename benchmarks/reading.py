"""What it costs to prepare a table of texts, beside an earlier version of this package.

    python benchmarks/reading.py --against REVISION [--quick]
    python benchmarks/reading.py --against REVISION --big GIGABYTES

Each measurement is a process of its own that prepares 100,000 short texts from CSV, JSON lines or Parquet for training
(read, decide what the columns are, find the labels, draw a validation split, look for duplicates; no tokenization) and
reports its seconds and its peak memory above the imported libraries. The two versions take turns. REVISION is checked
out into a temporary folder. Writes benchmarks/results/reading.json and .md; finished measurements are kept.

`--big` makes one CSV file of that size (reviews of 200 words) in the temporary folder, and measures once what its
loading and its whole preparation take: seconds, peak resident memory, and the peak of what is not backed by a file,
which the system cannot take back. Writes benchmarks/results/reading_big.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reading.json"
WORK = """
import json, resource, sys, time
from hf_transfer.runs.prepare import prepare
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.settings import Config
import hf_transfer.tasks, datasets, transformers.models.bert.modeling_bert
quiet_libraries("error")
keys = dict(model_name_or_path="bundled:minilm-l6", train_file=sys.argv[1], output_dir=sys.argv[2], use_cpu=True)
config = Config.from_sources({}, keys)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
prepared = prepare(config)
seconds = time.perf_counter() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": seconds, "megabytes": memory / 1024, "examples": len(prepared.data.train)}))
"""
BIG_WORK = """
import json, re, resource, sys, threading, time
from pathlib import Path
from hf_transfer.data.load import load_splits
from hf_transfer.runs.prepare import prepare
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.settings import Config
import hf_transfer.tasks, datasets, transformers.models.bert.modeling_bert
quiet_libraries("error")
keys = dict(model_name_or_path="bundled:minilm-l6", train_file=sys.argv[1], output_dir=sys.argv[2], use_cpu=True)
config = Config.from_sources({}, keys)
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
most, before, resident, start = [own()], own(), peak(), time.perf_counter()
def watch():
    while True:
        most[0] = max(most[0], own())
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
work = {"load": lambda: load_splits(config.data)["train"], "prepare": lambda: prepare(config).data.train}[sys.argv[3]]
examples = len(work())
print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": peak() - resident, "own": most[0] - before,
                  "examples": examples}))
"""
WORDS = [f"word{i}" for i in range(2000)]


def write(folder: Path, rows: int) -> dict[str, Path]:
    """The same texts in three formats."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = np.random.default_rng(0).integers(0, len(WORDS), (rows, 20)).tolist()
    table = {"text": [" ".join(WORDS[i] for i in row) for row in words], "label": ["ab"[row[0] % 2] for row in words]}
    pairs = list(zip(table["text"], table["label"], strict=True))
    files = {name: folder / f"t.{name}" for name in ("csv", "jsonl", "parquet")}
    files["csv"].write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in pairs))
    files["jsonl"].write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    pq.write_table(pa.table(table), files["parquet"])
    return files


def write_big(folder: Path, gigabytes: float) -> Path:
    """One CSV file of reviews of 200 words."""
    import numpy as np

    file, rng = folder / "big.csv", np.random.default_rng(0)
    with file.open("w") as out:
        out.write("text,label\n")
        while out.tell() < gigabytes * 1e9:
            for row in rng.integers(0, len(WORDS), (5000, 200)).tolist():
                out.write(f"{' '.join(WORDS[i] for i in row)},{'ab'[row[0] % 2]}\n")
    return file


def measure(code: Path, file: Path, folder: Path, work: str = WORK, *arguments: str) -> dict[str, float]:
    """One process that prepares `file` with the package in `code`; nothing is cached from before."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        environment = {**os.environ, "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{fresh}/c"}
        command = [sys.executable, "-c", work, str(file), f"{fresh}/out", *arguments]
        done = subprocess.run(command, env=environment, cwd=fresh, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def table(cells: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    lines = ["| format | seconds | before | ratio (median, range) | memory MB | before |", "|---|---|---|---|---|---|"]
    for name, turns in cells.items():
        middle = {side: {k: statistics.median(t[side][k] for t in turns) for k in ("seconds", "megabytes")}
                  for side in ("now", "before")}  # fmt: skip
        ratios = [t["now"]["seconds"] / t["before"]["seconds"] for t in turns]
        lines.append(
            f"| {name} | {middle['now']['seconds']:.1f} | {middle['before']['seconds']:.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{middle['now']['megabytes']:.0f} | {middle['before']['megabytes']:.0f} |"
        )
    return "\n".join(lines)


def big_table(cells: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| | seconds | before | peak MB | before | not backed by a file, MB | before |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sides in cells.items():
        pairs = [f"{sides[side][k]:,.0f}" for k in ("seconds", "megabytes", "own") for side in ("now", "before")]
        lines.append(f"| {name} | {' | '.join(pairs)} |")
    return "\n".join(lines)


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[tuple[Path, Path]]:
    """(a temporary folder, the package as it was at `revision`)."""
    with tempfile.TemporaryDirectory() as name:
        before = Path(name) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(before), revision], cwd=ROOT, check=True)
        try:
            yield Path(name), before
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)


def big(against: str, gigabytes: float) -> str:
    """Measure one file of `gigabytes`; the results as text."""
    cells: dict[str, dict[str, dict[str, float]]] = {}
    with checked_out(against) as (folder, before):
        file = write_big(folder, gigabytes)
        for name in ("load", "prepare"):
            now, then = (measure(code, file, folder, BIG_WORK, name) for code in (ROOT, before))
            cells[name] = {"now": now, "before": then}
    about = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "cells": cells}
    examples = int(cells["load"]["now"]["examples"])
    title = f"A CSV file of {gigabytes:g} GB ({examples:,} reviews) against {against}, {about['machine']}"
    text = f"# Reading a large table\n\n{title}\n\n{big_table(cells)}\n"
    result = RESULTS.with_name("reading_big.json")
    result.write_text(json.dumps({title: about}, indent=1) + "\n")
    result.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", type=float, metavar="GIGABYTES", help="one CSV file of this size, and peak memory")
    parser.add_argument("--against", required=True, help="revision to compare with")
    parser.add_argument("--quick", action="store_true", help="10,000 texts, one turn")
    options = parser.parse_args()
    if options.big:
        sys.stdout.write(big(options.against, options.big))
        return
    rows, turns = (10_000, 1) if options.quick else (100_000, 5)
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    key = f"{rows} rows against {options.against}"
    cells = kept.get(key, {}).get("cells", {})
    with checked_out(options.against) as (folder, before):
        files = write(folder, rows)
        for form, file in files.items():
            for _ in range(turns - len(cells.setdefault(form, []))):
                cells[form].append({"now": measure(ROOT, file, folder), "before": measure(before, file, folder)})
                about = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
                kept[key] = {"machine": about, "datasets": version("datasets"), "cells": cells}
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    text = f"# Reading tables\n\n{key}, {kept[key]['machine']}, datasets {kept[key]['datasets']}\n\n{table(cells)}\n"
    if not options.quick:
        RESULTS.with_suffix(".md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
