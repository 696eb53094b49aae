"""Run by `accelerate launch` with two processes: gradual unfreezing, compared between ranks and with one process.

Writes one JSON file: {case: {"stages": n, "ranks": largest difference between ranks at any stage's end}} and the
weights of rank 0. Without the reducer being built anew at each unfreeze the ranks drift apart: the difference is not 0.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_transfer import TransferTrainer
from tests.helpers import arguments, copy_state, texts, tiny_bert

CASES = {"plain": 1, "accumulated": 2}


class CompareRanks(TrainerCallback):
    """The largest difference between ranks over parameters and buffers, at each log (every stage ends with one)."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.worst = model, 0.0

    def on_log(self, args, state, control, **kwargs):
        for value in copy_state(self.model).values():
            if dist.is_initialized():
                other = value.clone()
                dist.broadcast(other, src=0)
                self.worst = max(self.worst, (other - value).abs().max().item())


def run(accumulate: int, folder: Path) -> tuple[dict[str, float], TransferTrainer]:
    """The same global batch of 8 whatever the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = tiny_bert(layers=2).double()
    args = arguments(
        folder,
        strategy="gradual",
        num_train_epochs=4,
        optim="sgd",
        learning_rate=0.05,
        head_learning_rate=0.5,
        layer_lr_decay=0.5,
        per_device_train_batch_size=8 // world // accumulate,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        logging_steps=2,
        max_grad_norm=1.0,
    )
    trainer = TransferTrainer(model, args, train_dataset=texts(32))
    compare = CompareRanks(model)
    trainer.add_callback(compare)
    trainer.train()
    worst = torch.tensor([compare.worst])
    if dist.is_initialized():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return {"stages": len(trainer.stage_records), "ranks": worst.item(), "processes": args.world_size}, trainer


def main(folder: Path) -> None:
    results = {}
    for name, accumulate in CASES.items():
        results[name], trainer = run(accumulate, folder)
        if trainer.is_world_process_zero():
            torch.save(copy_state(trainer.model), folder / f"{name}.pt")
    if trainer.is_world_process_zero():
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
