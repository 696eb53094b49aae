"""What the trainer costs per step: plain Trainer against TransferTrainer with nothing on, with rates, guards and logs.

    python benchmarks/overhead.py [--rounds 20] [--steps 40] [--quick]

The same small BERT (4 layers, hidden 128), batch and data, one thread, interleaved in one process, in an order that is
drawn anew for each round. What else the machine does only adds time, so each case is represented by the mean of its
fastest quarter of rounds; the medians of the ratios within a round stand beside it, of wall time and of the process's
own. Writes benchmarks/results/overhead.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
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
    "guards off": (TransferTrainer, TransferArguments, {"layer_lr_decay": 0.9, "save_on_signal": False}),
    "guards on": (TransferTrainer, TransferArguments, {"layer_lr_decay": 0.9, "on_nonfinite": "stop"}),
    "plain Trainer, each step logged": (Trainer, TrainingArguments, {"logging_steps": 1}),
    "rates, guards, each step logged": (
        TransferTrainer,
        TransferArguments,
        {"layer_lr_decay": 0.9, "on_nonfinite": "stop", "logging_steps": 1},
    ),
}
# The others: plain Trainer.
AGAINST = {"guards on": "guards off", "rates, guards, each step logged": "plain Trainer, each step logged"}


def seconds(case: str, steps: int, data: Dataset, folder: str) -> tuple[float, float]:
    """(wall, the process's own) time of `steps` steps after a warm-up of 5."""
    trainer_class, arguments_class, keys = CASES[case]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=1000
    )
    usual = dict(
        use_cpu=True,
        max_steps=steps + 5,
        per_device_train_batch_size=BATCH,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    args = arguments_class(folder, **{**usual, **keys})
    clock = Clock()
    trainer = trainer_class(
        transformers.BertForSequenceClassification(config), args, train_dataset=data, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return time.perf_counter() - clock.began, time.process_time() - clock.cpu_began


def fastest(times: list[float]) -> float:
    """Mean of the fastest quarter."""
    return statistics.mean(sorted(times)[: max(1, len(times) // 4)])


def quartiles(ratios: list[float]) -> list[float]:
    """The first and the third."""
    return statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2


class Clock(transformers.TrainerCallback):
    began = cpu_began = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="one round of 5 steps, nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 1, 5
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    rows = (options.steps + 5) * BATCH
    data = Dataset.from_dict(
        {
            "input_ids": torch.randint(0, 1000, (rows, LENGTH), generator=g).tolist(),
            "labels": torch.randint(0, 2, (rows,), generator=g).tolist(),
        }
    )
    times: dict[str, list[float]] = {case: [] for case in CASES}
    own: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(options.rounds):
            for case in random.Random(round_).sample(list(CASES), len(CASES)):
                wall, cpu = seconds(case, options.steps, data, folder)
                times[case].append(wall / options.steps)
                own[case].append(cpu / options.steps)
    found = {}
    for case, t in times.items():
        other = times[AGAINST.get(case, "plain Trainer")]
        ratios = [a / b for a, b in zip(t, other, strict=True)]
        cpu_ratios = [a / b for a, b in zip(own[case], own[AGAINST.get(case, "plain Trainer")], strict=True)]
        quickest, others = fastest(t), fastest(other)
        found[case] = {
            "ms_per_step": 1000 * quickest,
            "against": AGAINST.get(case, "plain Trainer"),
            "microseconds_more": 1e6 * (quickest - others),
            "ratio": quickest / others,
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": quartiles(ratios),
            "cpu_ratio_median": statistics.median(cpu_ratios),
            "cpu_ratio_quartiles": quartiles(cpu_ratios),
        }
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "rounds": options.rounds,
        "steps": options.steps,
        **{p: version(p) for p in ("torch", "transformers", "accelerate")},
    }
    lines = [
        "# Cost per step",
        "",
        f"`python benchmarks/overhead.py`: {', '.join(f'{k} {v}' for k, v in where.items())}.",
        "BERT, 4 layers, hidden 128, batch 8, length 32, fp32 on the CPU. Each case by the fastest quarter of rounds;",
        "beside it the median and the quartiles of the ratios within a round.",
        "CPU: the same of the process's own time, which other work on the machine takes no part of.",
        "Guards: signals save a checkpoint; loss and gradient are looked at (`on_nonfinite: stop`). Every 10th step is",
        "logged, or each; plain Trainer logs one rate, ours that of each layer group.",
        "",
        "| | ms per step | against | µs more | ratio | median | quartiles | CPU, median | quartiles |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {r['ms_per_step']:.2f} | {r['against']} | {r['microseconds_more']:.0f} | {r['ratio']:.3f} | "
        f"{r['ratio_median']:.3f} | {r['ratio_quartiles'][0]:.3f} to {r['ratio_quartiles'][1]:.3f} | "
        f"{r['cpu_ratio_median']:.3f} | {r['cpu_ratio_quartiles'][0]:.3f} to {r['cpu_ratio_quartiles'][1]:.3f} |"
        for case, r in found.items()
    ]
    print("\n".join(lines))
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "overhead.json").write_text(json.dumps({"where": where, "results": found}, indent=2) + "\n")
        (RESULTS / "overhead.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
