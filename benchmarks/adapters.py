"""LoRA and bottleneck adapters against full fine-tuning: accuracy, parameters, optimizer bytes, disk, seconds.

    python benchmarks/adapters.py            # about 10 minutes on two cores

Each method trains on the same examples, for the same epochs; seeds 0, 1, 2. Writes `results/adapters.json` and
`results/adapters.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMON = dict(save_strategy="no", eval_strategy="no", log_level="error", per_device_eval_batch_size=64)
SETTINGS: dict[str, dict[str, Any]] = {
    "MiniLM-L6, Rotten Tomatoes": dict(
        model_name_or_path="bundled:minilm-l6",
        dataset_name="bundled:rotten-tomatoes",
        max_train_samples=512,
        max_eval_samples=32,
        max_predict_samples=512,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        warmup_steps=0.1,
    ),
    "EfficientNet-Lite0, digits": dict(
        model_name_or_path="bundled:efficientnet-lite0",
        dataset_name="bundled:digits",
        image_size=48,
        max_train_samples=400,
        max_eval_samples=32,
        num_train_epochs=4,
        per_device_train_batch_size=16,
        warmup_steps=0.1,
    ),
}
# A usual rate for each method: nothing is tuned for this table.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "MiniLM-L6, Rotten Tomatoes": {
        "full": dict(strategy="full", learning_rate=2e-4),
        "lora": dict(strategy="lora", learning_rate=2e-3),
        "bottleneck": dict(adapter={"peft_type": "BOTTLENECK", "reduction_factor": 8}, learning_rate=2e-3),
    },
    "EfficientNet-Lite0, digits": {
        "full": dict(strategy="full", learning_rate=1e-3),
        "lora": dict(strategy="lora", learning_rate=2e-3),
        "bottleneck": dict(adapter={"peft_type": "BOTTLENECK", "reduction_factor": 8}, learning_rate=2e-3),
    },
}
SEEDS = (0, 1, 2)


def measure(keys: dict[str, Any]) -> dict[str, float]:
    """One run."""
    from hf_transfer import fine_tune

    with tempfile.TemporaryDirectory() as folder:
        result = fine_tune(output_dir=f"{folder}/out", **keys)
        optimizer = result.trainer.optimizer.optimizer.state_dict()["state"].values()
        weights = [p for p in result.output_dir.iterdir() if p.suffix == ".safetensors"]
        return {
            "accuracy": result.metrics["accuracy"],
            "trained": result.results["trainable_parameters"],
            "optimizer_bytes": sum(v.nbytes for s in optimizer for v in s.values() if hasattr(v, "nbytes")),
            "disk_bytes": sum(p.stat().st_size for p in weights),
            "seconds": result.results["train_seconds"],
        }


def row(setting: str, method: str, runs: list[dict[str, float]]) -> str:
    accuracy = [r["accuracy"] for r in runs]
    first = runs[0]
    spread = f" ± {statistics.stdev(accuracy):.3f}" if len(accuracy) > 1 else ""
    return (
        f"| {setting} | {method} | {statistics.mean(accuracy):.3f}{spread} | {first['trained']:,.0f} | "
        f"{first['optimizer_bytes'] / 1e6:.1f} MB | {first['disk_bytes'] / 1e6:.1f} MB | "
        f"{statistics.mean(r['seconds'] for r in runs):.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--only", default="", help="a part of a setting's name")
    args = parser.parse_args()
    path = RESULTS / "adapters.json"
    found: dict[str, Any] = json.loads(path.read_text())["runs"] if path.is_file() and args.only else {}
    for setting, keys in SETTINGS.items():
        if args.only not in setting:
            continue
        for method, own in METHODS[setting].items():
            runs = [measure({**COMMON, **keys, **own, "seed": seed}) for seed in args.seeds]
            found[f"{setting}/{method}"] = runs
            print(row(setting, method, runs), flush=True)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"date": str(date.today()), "runs": found}, indent=1) + "\n")
    head = [
        "# Adapters against full fine-tuning",
        "",
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread, beside other work,",
        "fp32, `python benchmarks/adapters.py`: mean ± standard deviation of seeds "
        f"{', '.join(map(str, args.seeds))}; test splits.",
        "",
        "| model, data | method | accuracy | trained parameters | optimizer | weights on disk | training |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [row(*name.split("/"), runs) for name, runs in found.items()]
    (RESULTS / "adapters.md").write_text("\n".join([*head, *rows, ""]))


if __name__ == "__main__":
    main()
