"""How long it takes until a command answers: help, completion, a mistake, and what a run imports.

    python benchmarks/startup.py [--repeats 7] [--quick]

Each command is a fresh process; the median and the fastest of the repeats, with the time of an empty Python process
among them. Writes benchmarks/results/startup.json and .md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers.timing import environment, report

PROGRAM = [sys.executable, "-m", "hf_transfer"]
CASES = {
    "an empty Python process": [sys.executable, "-c", ""],
    "`hf-transfer --help`": [*PROGRAM, "--help"],
    "`hf-transfer train --help`": [*PROGRAM, "train", "--help"],
    "an unknown command": [*PROGRAM, "fit"],
    "`train`: an unknown key": [*PROGRAM, "train", "bundled:minilm-l6", "bundled:rotten-tomatoes", "--epochs", "3"],
    "`train`: a wrong value": [*PROGRAM, "train", "bundled:minilm-l6", "bundled:rotten-tomatoes", "--strategy", "ful"],
    "`train`: a file that does not exist": [*PROGRAM, "train", "bundled:minilm-l6", "reviws.csv"],
    "`predict`: an unknown key": [*PROGRAM, "predict", "run", "text", "--top", "3"],
    "completion script for bash": [*PROGRAM, "--print_completion", "bash"],
    "what a run imports (torch, transformers, datasets)": [sys.executable, "-c", "import hf_transfer.runs.run"],
}


def seconds(command: list[str], folder: str) -> float:
    """Wall time of one process."""
    began = time.perf_counter()
    subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, env=environment()
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "reviews.csv").write_text("text,label\na,b\n")
        for command in CASES.values():
            seconds(command, folder)  # files are read into memory
        for _ in range(repeats):
            for name, command in CASES.items():
                taken[name].append(seconds(command, folder))
    about = f"{{on}}; {repeats} processes each, after one that is not counted."
    report("startup", "Until a command answers", about, taken, writes=not options.quick)


if __name__ == "__main__":
    main()
