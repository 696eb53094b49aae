"""What the trainer costs per step: plain Trainer against TransferTrainer, off and with layer-wise rates.

    python benchmarks/overhead.py [--rounds 7] [--steps 40]

The same small BERT (4 layers, hidden 128), batch and data, interleaved in one process; the ratio of each round is to
the plain Trainer of the same round. Writes benchmarks/results/overhead.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_transfer import TransferArguments, TransferTrainer

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH = 8, 32
CASES = {
    "plain Trainer": (Trainer, TrainingArguments, {}),
    "TransferTrainer, no key": (TransferTrainer, TransferArguments, {}),
    "layer-wise rates": (TransferTrainer, TransferArguments, {"layer_lr_decay": 0.9}),
    "gradual, 6 stages": (
        TransferTrainer,
        TransferArguments,
        {"strategy": "gradual", "unfreeze_interval": 0.01, "layer_lr_decay": 0.9},
    ),
}


def seconds(case: str, steps: int, data: Dataset, folder: str) -> float:
    """Training time of `steps` steps after a warm-up of 5."""
    trainer_class, arguments_class, keys = CASES[case]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=1000
    )
    args = arguments_class(
        folder,
        use_cpu=True,
        max_steps=steps + 5,
        per_device_train_batch_size=BATCH,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **keys,
    )
    clock = Clock()
    trainer = trainer_class(
        transformers.BertForSequenceClassification(config), args, train_dataset=data, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return time.perf_counter() - clock.began


class Clock(transformers.TrainerCallback):
    began = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.began = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    rows = (options.steps + 5) * BATCH
    data = Dataset.from_dict(
        {
            "input_ids": torch.randint(0, 1000, (rows, LENGTH), generator=g).tolist(),
            "labels": torch.randint(0, 2, (rows,), generator=g).tolist(),
        }
    )
    times: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for case in CASES:
                times[case].append(seconds(case, options.steps, data, folder) / options.steps)
    plain = times["plain Trainer"]
    found = {
        case: {
            "ms_per_step": 1000 * statistics.median(t),
            "ratio": statistics.median(a / b for a, b in zip(t, plain, strict=True)),
            "ratio_min": min(a / b for a, b in zip(t, plain, strict=True)),
            "ratio_max": max(a / b for a, b in zip(t, plain, strict=True)),
        }
        for case, t in times.items()
    }
    where = {
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "rounds": options.rounds,
        "steps": options.steps,
        **{p: version(p) for p in ("torch", "transformers", "accelerate")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps({"where": where, "results": found}, indent=2) + "\n")
    lines = [
        "# Cost per step",
        "",
        f"`python benchmarks/overhead.py`: {', '.join(f'{k} {v}' for k, v in where.items())}.",
        "BERT, 4 layers, hidden 128, batch 8, length 32, fp32 on the CPU; ratios to plain Trainer in the same round.",
        "",
        "| | ms per step (median) | ratio (median) | lowest to highest |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {r['ms_per_step']:.2f} | {r['ratio']:.3f} | {r['ratio_min']:.3f} to {r['ratio_max']:.3f} |"
        for case, r in found.items()
    ]
    (RESULTS / "overhead.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
