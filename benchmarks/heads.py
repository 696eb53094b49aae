"""Changing the task on one backbone: HeadBank against loading a merged model for each change, and memory per task.

    python benchmarks/heads.py

Three LoRA runs on MiniLM-L6 with labels of their own. Writes `results/heads.json` and `results/heads.md`.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TEXT = "a film of rare beauty"
LABELS = {"tone": ("negative", "positive"), "topic": ("art", "law", "sport"), "tongue": ("de", "en", "fr", "it", "pl")}
KEYS = dict(strategy="lora", num_train_epochs=1, save_strategy="no", log_level="error", max_steps=2)


def timed(action: Callable[[], Any], times: int) -> float:
    """Median milliseconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def main() -> None:
    import torch

    from hf_transfer import HeadBank, Predictor, fine_tune, merge

    torch.set_num_threads(1)  # threads of one process wait for each other where the cores are shared
    with tempfile.TemporaryDirectory() as folder:
        for name, labels in LABELS.items():
            rows = "".join(f"line {i},{labels[i % len(labels)]}\n" for i in range(32))
            (Path(folder) / f"{name}.csv").write_text(f"text,label\n{rows}")
            fine_tune("bundled:minilm-l6", f"{folder}/{name}.csv", output_dir=f"{folder}/{name}", **KEYS)
            merge(f"{folder}/{name}", f"{folder}/{name}-merged")
        bank, sizes, names = HeadBank(), [0], list(LABELS)
        for name in names:
            bank.add(name, f"{folder}/{name}")
            sizes.append(bank.nbytes)
        bank.predict(TEXT, task=names[0])
        merged = Predictor.load(f"{folder}/{names[0]}-merged")
        order = iter(names * 1000)
        found = {
            "answer, same task": timed(lambda: bank.predict(TEXT, task=names[0]), 60),
            "answer, task changed each time": timed(lambda: bank.predict(TEXT, task=next(order)), 60),
            "answer of one merged model": timed(lambda: merged.predict(TEXT), 60),
            "load a merged model, then answer": timed(
                lambda: Predictor.load(f"{folder}/{next(order)}-merged").predict(TEXT), 6
            ),
        }
        per_task = [b - a for a, b in itertools.pairwise(sizes)]
        whole = sum(p.numel() * p.element_size() for p in merged.model.parameters())
    record = {"date": str(date.today()), "milliseconds": found, "bytes_per_task": per_task, "merged_bytes": whole}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "heads.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Many tasks on one backbone",
        "",
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread, MiniLM-L6 with LoRA of rank 8,",
        "`python benchmarks/heads.py`: medians.",
        "",
        "| one text | milliseconds |",
        "|---|---|",
        *(f"| {name} | {value:,.1f} |" for name, value in found.items()),
        "",
        f"Memory: {per_task[0] / 1e6:.1f} MB for the first task with the backbone, then "
        f"{' and '.join(f'{b / 1e6:.2f}' for b in per_task[1:])} MB; a merged model has {whole / 1e6:.1f} MB.",
        "",
    ]
    (RESULTS / "heads.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
