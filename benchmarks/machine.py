"""What `plan` says of this machine and what `cpu_threads: auto` takes of it, beside what happens.

    python benchmarks/machine.py [--steps 60] [--rounds 3] [--cases text image] [--quick]

Each cell is a process of its own: a plan, or a run of a few steps without evaluations and checkpoints, with each number
of threads and of workers of a small grid and with what is chosen. Three questions, each a median over the rounds:

- Is the choice within 5% of the best of the grid?
- Is the predicted time of training steps within 15% of the real one?
- Is the peak of the process's memory, less what the imported libraries take, within 15% of the plan's?

Cells that are finished are kept in benchmarks/results/machine.json; the table is in machine.md. On a machine that does
other work, all three say little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TEXT = {"model_name_or_path": "bundled:minilm-l6", "dataset_name": "bundled:rotten-tomatoes"}
IMAGE = {"model_name_or_path": "bundled:efficientnet-lite0", "dataset_name": "bundled:digits", "image_size": 96}
CASES: dict[str, dict[str, Any]] = {
    "text, full": {**TEXT, "strategy": "full", "per_device_train_batch_size": 16},
    "text, two-phase": {**TEXT, "strategy": "two-phase", "head_epochs": 0.3, "per_device_train_batch_size": 16},
    "text, lora": {**TEXT, "strategy": "lora", "per_device_train_batch_size": 16},
    "text, probe": {**TEXT, "strategy": "linear-probe", "per_device_train_batch_size": 16},
    "image, full": {**IMAGE, "strategy": "full", "per_device_train_batch_size": 16},
    "image, partial": {**IMAGE, "strategy": "partial", "unfrozen_groups": 2, "per_device_train_batch_size": 16},
}
WORKERS = {"text": [0], "image": [0, 1]}
CHOSEN = "chosen"
WITHIN, OFF = 1.05, 0.15
COMMON = {
    "use_cpu": True,
    "boundary_cache": "off",
    "preflight": False,
    "expected_accuracy": False,
    "calibrate": False,
    "label_issues": False,
    "data_facts": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "log_level": "error",
}


def resident(field: str) -> int:
    """Bytes of this process by the kernel: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This benchmark reads /proc/self/status, which only Linux has.")


def cell(asked: dict[str, Any]) -> dict[str, Any]:
    """One process: what a plan says, or what a run takes."""
    from hf_transfer.runs.preview import plan_only
    from hf_transfer.runs.run import run
    from hf_transfer.settings import Config

    steps = asked["steps"]
    with tempfile.TemporaryDirectory() as folder:
        keys = {**COMMON, **CASES[asked["case"]], **asked["keys"], "output_dir": f"{folder}/out"}
        keys["max_train_samples"] = int(steps * keys["per_device_train_batch_size"] / 0.9) + 1
        keys["num_train_epochs"] = 1
        config = Config.from_sources({}, keys)
        before = resident("VmRSS")
        if asked["what"] == "plan":
            here = plan_only(config, talks=False).to_dict()["budget"]["this_machine"]
            return {"seconds": here["seconds"], "bytes": here["process_bytes"] - before}
        result = run(config)
        return {
            "seconds": result.results["train_seconds"],
            "peak": resident("VmHWM") - before,
            "threads": result.results["auto"].get("cpu_threads", {}).get("value"),
        }


def grid(case: str) -> dict[str, dict[str, Any]]:
    """Cells of a case: what each asks for."""
    import torch

    from hf_transfer.runs.machine import cores
    from hf_transfer.runs.threads import numbers

    tried = [(t, w) for t in numbers(torch.get_num_threads(), cores()) for w in WORKERS[case.partition(",")[0]]]
    runs = {f"{t} threads, {w} workers": {"cpu_threads": t, "dataloader_num_workers": w} for t, w in tried}
    return {"plan": {}, "as it is": {}, CHOSEN: {"cpu_threads": "auto"}, **runs}


def measure(options: argparse.Namespace, book: dict[str, Any]) -> None:
    """Fill the book with the cells that it lacks."""
    for number in range(options.rounds):
        for case in options.chosen_cases:
            for name, keys in grid(case).items():
                key = f"{case} | {name} | {options.steps} steps | {number}"
                if key in book:
                    continue
                asked = {
                    "case": case,
                    "what": "plan" if name == "plan" else "run",
                    "keys": keys,
                    "steps": options.steps,
                }
                command = [sys.executable, __file__, "--cell", json.dumps(asked)]
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                if ran.returncode:
                    raise SystemExit(f"{key}: {ran.stderr[-2000:]}")
                book[key] = json.loads(ran.stdout.splitlines()[-1])
                print(f"{key}: {book[key]}", flush=True)
                if not options.quick:
                    write(options, book)


def rows(options: argparse.Namespace, book: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per case, of medians over the rounds."""
    found = []
    for case in options.chosen_cases:
        cells: dict[str, list[dict[str, Any]]] = {}
        for key, outcome in book.items():
            of_case, name, steps, _ = key.split(" | ")
            if of_case == case and steps == f"{options.steps} steps":
                cells.setdefault(name, []).append(outcome)
        times = {name: statistics.median(o["seconds"] for o in outcomes) for name, outcomes in cells.items()}
        tried = {name: value for name, value in times.items() if "threads" in name}
        if not tried or {"plan", CHOSEN, "as it is"} - times.keys():
            continue
        best = min(tried, key=lambda name: tried[name])
        planned = statistics.median(o["bytes"] for o in cells["plan"])
        peak = statistics.median(o["peak"] for o in cells["as it is"])
        found.append(
            {
                "case": case,
                "chosen": ", ".join(sorted({str(o["threads"]) for o in cells[CHOSEN]})),
                "seconds": times[CHOSEN],
                "best": best,
                "ratio": times[CHOSEN] / tried[best],
                "time error": times["plan"] / times["as it is"] - 1,
                "memory error": planned / peak - 1,
                "planned": planned,
                "peak": peak,
            }
        )
    return found


def table(options: argparse.Namespace, book: dict[str, Any]) -> str:
    lines = [
        "# The machine: chosen and predicted, beside measured",
        "",
        f"{platform.machine()}, {platform.system()}, torch {version('torch')}, {options.steps} steps a run, medians of "
        f"up to {options.rounds} rounds. Written by `benchmarks/machine.py`.",
        "",
        "| case | threads chosen | seconds | best of the grid | chosen / best | predicted time | memory: plan, peak |",
        "|---|---|---|---|---|---|---|",
    ]
    found = rows(options, book)
    for row in found:
        lines.append(
            f"| {row['case']} | {row['chosen']} | {row['seconds']:.1f} | {row['best']} | {row['ratio']:.2f} | "
            f"{row['time error']:+.0%} | {row['planned'] / 1e6:,.0f}, {row['peak'] / 1e6:,.0f} MB "
            f"({row['memory error']:+.0%}) |"
        )
    if found:
        worst = max(row["ratio"] for row in found)
        time_off = statistics.median(abs(row["time error"]) for row in found)
        memory_off = statistics.median(abs(row["memory error"]) for row in found)
        said = {True: "reached", False: "missed"}
        lines += [
            "",
            f"- Chosen within {WITHIN - 1:.0%} of the best: {said[worst <= WITHIN]} (at worst {worst:.2f}).",
            f"- Predicted time, median error: {time_off:.0%} ({said[time_off <= OFF]}: at most {OFF:.0%}).",
            f"- Memory, median error: {memory_off:.0%} ({said[memory_off <= OFF]}: at most {OFF:.0%}).",
        ]
    return "\n".join(lines) + "\n"


def write(options: argparse.Namespace, book: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "machine.json").write_text(json.dumps(book, indent=1) + "\n")
    (RESULTS / "machine.md").write_text(table(options, book))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["text", "image"], help="beginnings of names of cases")
    parser.add_argument("--quick", action="store_true", help="one case of a few steps, nothing is written")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(json.loads(options.cell))))
        return
    options.chosen_cases = [case for case in CASES if case.startswith(tuple(options.cases))]
    if options.quick:
        options.steps, options.rounds, options.chosen_cases = 6, 1, options.chosen_cases[:1]
    file = RESULTS / "machine.json"
    book = json.loads(file.read_text()) if file.exists() and not options.quick else {}
    measure(options, book)
    print(table(options, book))


if __name__ == "__main__":
    main()
