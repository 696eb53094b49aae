"""Peak memory of training: the cache against the same run without it, and against full fine-tuning.

    python benchmarks/memory.py [--examples 2048] [--epochs 1] [--rounds 3] [--quick]

MiniLM-L6 on Rotten Tomatoes in batches of 32. Every run is a process of its own; its figure is the peak of its resident
memory less what the imported libraries take. The limits: 0.7 of full fine-tuning, and 1.05 of the same run without the
cache plus the bytes that are stored. Writes benchmarks/results/memory.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import race, text, trainers

RESULTS = Path(__file__).parent / "results"
PARTIAL = {"strategy": "partial", "unfrozen_groups": 2, "learning_rate": 2e-4}
PROBE = {"strategy": "linear-probe", "learning_rate": 5e-3}
CASES: dict[str, dict[str, Any] | None] = {
    "Trainer, full fine-tuning": None,
    "linear-probe, cache": {**PROBE, "boundary_cache": "memory"},
    "linear-probe": PROBE,
    "partial, cache": {**PARTIAL, "boundary_cache": "memory"},
    "partial": PARTIAL,
}
CACHED = {"linear-probe, cache": "linear-probe", "partial, cache": "partial"}
OF_FULL, OF_PLAIN = 0.7, 1.05


def resident(field: str) -> int:
    """Bytes of this process by the kernel: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This benchmark reads /proc/self/status, which only Linux has.")


def one(case: str, options: argparse.Namespace) -> dict[str, int]:
    """Train once; bytes above what was resident before the model was loaded, and bytes stored."""
    keys = CASES[case]
    with race.settled():
        before = resident("VmRSS")
        train, _ = text.examples(0, options)
        model, tokenizer = text.fresh(0)
        trainer: list[Any] = []
        trainers.fit(
            model,
            lambda: (text.tokenised(train, tokenizer, False), text.Dynamic(tokenizer)),
            0,
            options,
            text.BATCH,
            {"learning_rate": 2e-4} if keys is None else keys,
            trainers.no_freeze if keys is None else None,
            processing_class=tokenizer,
            finished=trainer.append,
        )
    entries = [] if keys is None else trainer[0].boundary.entries
    return {"peak": resident("VmHWM") - before, "stored": sum(entry.nbytes for entry in entries if entry.off is None)}


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, int]]]:
    """All cases in turn, `options.rounds` times."""
    found: dict[str, list[dict[str, int]]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            command = [sys.executable, __file__, "--case", case]
            command += ["--examples", str(options.examples), "--epochs", str(options.epochs)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found[case].append(json.loads(ran.stdout.splitlines()[-1]))
            print(f"{case}: {found[case][-1]['peak'] / 1e6:.0f} MB", flush=True)
    return found


def table(found: dict[str, list[dict[str, int]]], options: argparse.Namespace) -> str:
    peaks = {case: statistics.median(row["peak"] for row in rows) / 1e6 for case, rows in found.items()}
    stored = {case: rows[0]["stored"] / 1e6 for case, rows in found.items()}
    full = peaks["Trainer, full fine-tuning"]
    lines = [
        "# Peak memory",
        "",
        f"`python benchmarks/memory.py`, {time.strftime('%Y-%m-%d')}: "
        f"{', '.join(f'{k} {v}' for k, v in race.machine().items())}.",
        "",
        f"{text.ABOUT}; {options.examples} examples, {options.epochs} epochs, no evaluation. Peak of resident memory",
        f"above the imported libraries, median of {options.rounds} processes. Plain: the same run without the cache.",
        "",
        "| run | peak, MB | lowest, highest | stored, MB | of full fine-tuning | of plain and stored | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, rows in found.items():
        spread = ", ".join(f"{f(row['peak'] for row in rows) / 1e6:.0f}" for f in (min, max))
        of_full = peaks[case] / full
        row = f"| {case} | {peaks[case]:.0f} | {spread} | {stored[case]:.1f} | {of_full:.2f} "
        if case in CACHED:
            of_plain = (peaks[case] - stored[case]) / peaks[CACHED[case]]
            reached = "yes" if of_full <= OF_FULL and of_plain <= OF_PLAIN else "no"
            lines.append(f"{row}| {of_plain:.2f} | {reached} |")
        else:
            lines.append(f"{row}| – | – |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few examples, one round; results go nowhere")
    parser.add_argument("--case", choices=[*CASES], help=argparse.SUPPRESS)
    parser.set_defaults(held_out=1000)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one(options.case, options)))
        return
    if options.quick:
        options.examples, options.rounds = 64, 1
    found = measure(options)
    page = table(found, options)
    print(page)
    folder = Path(tempfile.mkdtemp()) if options.quick else RESULTS
    folder.mkdir(exist_ok=True)
    settings = {"examples": options.examples, "epochs": options.epochs, "rounds": options.rounds}
    (folder / "memory.json").write_text(json.dumps({"settings": settings, "runs": found}, indent=1) + "\n")
    (folder / "memory.md").write_text(page)


if __name__ == "__main__":
    main()
