"""What a learning-rate range test suggests, next to a grid of learning rates.

    python benchmarks/find_lr.py [--quick] [--cases text,image] [--examples 512] [--seed 0] [--results FOLDER]

Full fine-tuning of MiniLM on Rotten Tomatoes and of EfficientNet-Lite0 on digits: test accuracy at each learning rate
of a grid, and at the three suggestions of `hf-transfer find-lr`, of which `learning_rate: auto` takes the first. One
seed, accuracies only. Writes benchmarks/results/find_lr.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

from peers.race import RESULTS, machine

from hf_transfer import fine_tune
from hf_transfer.analysis.range_test import Sweep
from hf_transfer.runs.configured import configured
from hf_transfer.runs.finding_rate import find_lr

COMMON: dict[str, Any] = {
    "strategy": "full",
    "per_device_train_batch_size": 16,
    "warmup_steps": 0.1,
    "max_eval_samples": 64,
    "save_strategy": "no",
    "pooling": None,
    "calibrate": False,
    "preflight": False,
    "data_facts": False,
    "boundary_cache": "off",
    "log_level": "error",
}
CASES: dict[str, dict[str, Any]] = {
    "text": {
        "keys": {
            "model_name_or_path": "bundled:minilm-l6",
            "dataset_name": "bundled:rotten-tomatoes",
            "num_train_epochs": 2,
            "max_seq_length": 64,
        },
        "grid": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        "title": "MiniLM-L6 on Rotten Tomatoes, 2 epochs",
    },
    "image": {
        "keys": {
            "model_name_or_path": "bundled:efficientnet-lite0",
            "dataset_name": "bundled:digits",
            "num_train_epochs": 4,
            "image_size": 64,
        },
        "grid": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "title": "EfficientNet-Lite0 on digits, 4 epochs",
    },
}


def accuracy(keys: dict[str, Any], rate: float) -> float:
    """Test accuracy of a run at a learning rate, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        run = fine_tune(**keys, learning_rate=rate, output_dir=f"{folder}/out")
    return 100 * float(run.results["metrics"]["accuracy"])


def suggested(keys: dict[str, Any]) -> dict[str, float]:
    """{suggestion: learning rate}"""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(None, None, {**keys, "output_dir": f"{folder}/out"})
        found = find_lr(config, Sweep(), talks=False)
    return {name: values["learning_rate"] for name, values in found.keys.items()}


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of a case."""
    keys = {**COMMON, **CASES[case]["keys"], "max_train_samples": options.examples, "seed": options.seed}
    keys |= {"max_predict_samples": 64, "num_train_epochs": 1} if options.quick else {}
    grid = CASES[case]["grid"][2:4] if options.quick else CASES[case]["grid"]
    rates = suggested(keys)
    print(case, rates, flush=True)
    rows = []
    for name, rate in [*(("grid", rate) for rate in grid), *rates.items()]:
        rows.append({"rate": rate, "accuracy": accuracy(keys, rate), "of": name})
        print(rows[-1], flush=True)
    return {"case": case, "title": CASES[case]["title"], "rows": rows}


def page(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "# Range test against a grid of learning rates",
        "",
        f"{datetime.date.today()}, {machine()['cores']} cores, {options.examples} training examples, batch size 16, "
        f"seed {options.seed}; test accuracy in percent.",
    ]
    for one in found:
        lines += ["", f"## {one['title']}", "", "| learning rate | accuracy | |", "|---|---|---|"]
        best = max(row["accuracy"] for row in one["rows"] if row["of"] == "grid")
        for row in sorted(one["rows"], key=lambda row: row["rate"]):
            note = "" if row["of"] == "grid" else f"{row['of']}: {row['accuracy'] - best:+.1f} to the best of the grid"
            lines.append(f"| {row['rate']:.1e} | {row['accuracy']:.1f} | {note} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few examples and two rates")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.examples = min(options.examples, 64)
    found = [measure(case, options) for case in options.cases.split(",")]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "find_lr.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.results / "find_lr.md").write_text(page(found, options))


if __name__ == "__main__":
    main()
