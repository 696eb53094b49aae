"""What it costs to prepare a table of texts, beside an earlier version of this package.

    python benchmarks/reading.py --against REVISION [--quick]

Each measurement is a process of its own that prepares 100,000 short texts from CSV, JSON lines or Parquet for training
(read, decide what the columns are, find the labels, draw a validation split, look for duplicates; no tokenization) and
reports its seconds and its peak memory above the imported libraries. The two versions take turns. REVISION is checked
out into a temporary folder. Writes benchmarks/results/reading.json and .md; finished measurements are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
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


def measure(code: Path, file: Path, folder: Path) -> dict[str, float]:
    """One process that prepares `file` with the package in `code`; nothing is cached from before."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        environment = {**os.environ, "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{fresh}/c"}
        command = [sys.executable, "-c", WORK, str(file), f"{fresh}/out"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="revision to compare with")
    parser.add_argument("--quick", action="store_true", help="10,000 texts, one turn")
    options = parser.parse_args()
    rows, turns = (10_000, 1) if options.quick else (100_000, 5)
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    key = f"{rows} rows against {options.against}"
    cells = kept.get(key, {}).get("cells", {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = folder / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(before), options.against], cwd=ROOT, check=True)
        try:
            files = write(folder, rows)
            for form, file in files.items():
                for _ in range(turns - len(cells.setdefault(form, []))):
                    cells[form].append({"now": measure(ROOT, file, folder), "before": measure(before, file, folder)})
                    about = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
                    kept[key] = {"machine": about, "datasets": version("datasets"), "cells": cells}
                    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    text = f"# Reading tables\n\n{key}, {kept[key]['machine']}, datasets {kept[key]['datasets']}\n\n{table(cells)}\n"
    if not options.quick:
        RESULTS.with_suffix(".md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
