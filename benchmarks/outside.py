"""How long a whole `train` of a few short texts takes, and how much of it is not training.

    python benchmarks/outside.py [--texts 300] [--repeats 5] [--quick]

`hf-transfer train bundled:minilm-l6 data.csv` with no other key, on texts that are made up, each run a fresh process,
after one that is not counted. Training is what the run reports: the steps, their evaluations and the solution for the
head. The rest is import, preparation, checks and files. CPU time is that of all the process's threads, and tells more
than wall time where the machine is shared. Writes benchmarks/results/outside.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers.timing import environment, report

PROGRAM = [sys.executable, "-m", "hf_transfer", "train", "bundled:minilm-l6"]
QUICK = ["--max_steps", "1"]
MEASURES = {
    "total": "wall time of the process",
    "training": "of it training",
    "outside": "outside training",
    "cpu": "CPU time of the process",
}
WORDS = ["the", "a", "this", "film", "story", "plot", "actor", "scene", "music", "ending", "dialogue", "and", "with"]
SAID = {
    "positive": ["great", "wonderful", "superb", "delightful", "touching", "brilliant", "lovely", "funny", "warm"],
    "negative": ["bad", "dull", "boring", "terrible", "awful", "clumsy", "weak", "flat", "tedious", "poor"],
}


def write_texts(path: Path, count: int) -> None:
    """A table of short texts of two classes; one word in ten of those that say the class says the other one."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(count):
            label, other = ("positive", "negative")[:: 1 if i % 2 else -1]
            words = [chance.choice(WORDS) for _ in range(chance.randint(6, 22))]
            for _ in range(chance.randint(1, 3)):
                said = chance.choice(SAID[label if chance.random() < 0.9 else other])
                words.insert(chance.randrange(len(words)), said)
            rows.writerow([" ".join(words), label])


def measured(data: Path, out: Path, keys: list[str]) -> dict[str, float]:
    """Seconds of one run, by name of the measure.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [*PROGRAM, str(data), str(out), *keys]
    subprocess.run(command, check=True, capture_output=True, env=environment(HF_HUB_OFFLINE="1"))
    total, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    training = json.loads((out / "results.json").read_text(encoding="utf-8"))["train_seconds"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"total": total, "training": training, "outside": total - training, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one run of one step on 40 texts; writes no results")
    options = parser.parse_args()
    texts, repeats, keys = (40, 1, QUICK) if options.quick else (options.texts, options.repeats, [])
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.csv"
        write_texts(data, texts)
        if not options.quick:
            measured(data, Path(folder) / "first", keys)  # files are read into memory
        runs = [measured(data, Path(folder) / f"run-{i}", keys) for i in range(repeats)]
    taken = {what: [run[name] for run in runs] for name, what in MEASURES.items()}
    about = f"`train bundled:minilm-l6` on {texts} short texts: {{on}}; {repeats} processes."
    report("outside", "A whole run of a few texts", about, taken, writes=not options.quick, texts=texts)


if __name__ == "__main__":
    main()
