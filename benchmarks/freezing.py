"""What freezing saves: memory and time per step against full fine-tuning of the same model in the same run.

    python benchmarks/freezing.py [--rounds 5] [--steps 12] [--quick]

BERT with MiniLM-L6's shape (random weights), batch 16, length 32, AdamW, fp32. Each case freezes the embeddings and
some layers from the input; the cases of a round are interleaved. Bytes are counted after a step, not estimated. The
arithmetic limit counts, per layer, 1 unit of work forward and 2 backward, and only the forward one where it is frozen.
Writes benchmarks/results/freezing.json and .md.
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
from typing import Any

import torch
import transformers
from datasets import Dataset

from hf_transfer import TransferArguments, TransferTrainer

RESULTS = Path(__file__).parent / "results"
LAYERS, WARM_UP = 6, 3
CASES: dict[str, dict[str, Any]] = {
    "full": {"strategy": "full"},
    **{
        f"embeddings and {k} of {LAYERS} layers frozen": {"strategy": "partial", "unfrozen_groups": LAYERS - k}
        for k in (2, 4)
    },
    "head only": {"strategy": "linear-probe"},
}
TRAINED_LAYERS = dict(zip(CASES, (6, 4, 2, 0), strict=True))


class Watch(transformers.TrainerCallback):
    """The time after a warm-up, and the bytes of gradients and of optimizer state."""

    began = seconds = 0.0
    gradients = state = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.seconds = time.perf_counter() - self.began
        tensors = [t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t) and t.ndim]
        self.state = sum(t.numel() * t.element_size() for t in tensors)


def measure(case: str, steps: int, data: Dataset, folder: str) -> tuple[float, int, int]:
    """(seconds per step, bytes of gradients, bytes of optimizer state)."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=12, intermediate_size=1536
    )
    args = TransferArguments(
        folder,
        max_steps=steps + WARM_UP,
        per_device_train_batch_size=16,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
        **CASES[case],
    )
    watch = Watch()
    model = transformers.BertForSequenceClassification(config)
    TransferTrainer(model, args, train_dataset=data, callbacks=[watch]).train()
    return watch.seconds / steps, watch.gradients, watch.state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="one round of 3 steps, nothing is written")
    options = parser.parse_args()
    rounds, steps = (1, 3) if options.quick else (options.rounds, options.steps)
    rows = (steps + WARM_UP) * 16
    g = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 30000, (rows, 32), generator=g).tolist()
    data = Dataset.from_dict({"input_ids": texts, "labels": torch.randint(0, 2, (rows,), generator=g).tolist()})
    found: dict[str, list[tuple[float, int, int]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for case in CASES:
                found[case].append(measure(case, steps, data, folder))
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "rounds": rounds,
        "steps": steps,
        **{p: version(p) for p in ("torch", "transformers", "accelerate")},
    }
    results = {}
    lines = ["| | gradients, MB | optimizer, MB | time per step, ms | of full | lowest to highest | arithmetic |"]
    lines.append("|---|---|---|---|---|---|---|")
    for case, runs in found.items():
        ratios = [run[0] / full[0] for run, full in zip(runs, found["full"], strict=True)]
        limit = (LAYERS + 2 * TRAINED_LAYERS[case]) / (3 * LAYERS)
        milliseconds = 1000 * statistics.median(run[0] for run in runs)
        results[case] = {
            "gradient_bytes": runs[-1][1],
            "optimizer_bytes": runs[-1][2],
            "ms_per_step": milliseconds,
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "arithmetic": limit,
        }
        lines.append(
            f"| {case} | {runs[-1][1] / 1e6:.1f} | {runs[-1][2] / 1e6:.1f} | {milliseconds:.0f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {limit:.2f} |"
        )
    print("\n".join(lines))
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "freezing.json").write_text(json.dumps({"where": where, "results": results}, indent=2) + "\n")
    text = [
        "# What freezing saves",
        "",
        f"`python benchmarks/freezing.py`: {', '.join(f'{k} {v}' for k, v in where.items())}.",
        "",
        "BERT in MiniLM-L6's shape, batch 16, length 32, AdamW, fp32, on the CPU; times against full fine-tuning in",
        "the same round. Arithmetic: a frozen layer costs 1 of a trained one's 3 units, embeddings and head 0. It does",
        "not count the optimizer, for which the embeddings are half of the model: freezing saves more than it says.",
        "",
        *lines,
        "",
    ]
    (RESULTS / "freezing.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
