"""Run by `accelerate launch` with two processes: gradual unfreezing, compared between ranks and with one process.

Writes one JSON file, {case: {"stages", "processes", "ranks": largest difference between ranks}}, and rank 0's weights.
What was broken without us: with `ddp_find_unused_parameters=False`, a reducer that is not built anew at each unfreeze
waits for gradients that never come, and torch raises; with BatchNorm in train mode, the ranks' statistics differ where
they are frozen, evaluated and saved.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_transfer import TransferTrainer
from tests.helpers import arguments, copy_state, images, texts, tiny_bert, tiny_timm_resnet

TEXT = {"model": lambda: tiny_bert(layers=2).double(), "data": lambda: texts(32), "num_train_epochs": 4}
# case -> keys; the texts equal one process exactly, BatchNorm in train mode sees other batches on two
CASES: dict[str, dict[str, Any]] = {
    "plain": TEXT,
    "accumulated": {**TEXT, "gradient_accumulation_steps": 2},
    "no traversal": {**TEXT, "ddp_find_unused_parameters": False},
    "adapter": {**TEXT, "adapter": "lora", "lora_plus_ratio": 4},
    "batchnorm": {
        "model": tiny_timm_resnet,
        "data": lambda: images(32),
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "groups_per_unfreeze": 3,
    },
}


class CompareRanks(TrainerCallback):
    """The largest difference between ranks: parameters at each log, buffers too at each evaluation and stage's end."""

    def __init__(self, trainer: TransferTrainer):
        self.trainer, self.worst, self.stage, self.compared = trainer, 0.0, 0, 0

    def compare(self, values: list[torch.Tensor]) -> None:
        self.compared += 1
        for value in values if dist.is_initialized() else []:
            other = value.detach().clone()
            dist.broadcast(other, src=0)
            self.worst = max(self.worst, (other - value).abs().max().item())

    def on_log(self, args, state, control, **kwargs):
        self.compare(list(self.trainer.model.parameters()))

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer._stage != self.stage:
            self.stage = self.trainer._stage
            self.compare(list(copy_state(self.trainer.model).values()))

    def on_evaluate(self, args, state, control, **kwargs):
        self.compare(list(copy_state(self.trainer.model).values()))

    on_train_end = on_evaluate


def run(case: str, folder: Path) -> tuple[dict[str, float], TransferTrainer]:
    """The same global batch of 8 whatever the number of processes."""
    keys = dict(CASES[case])
    model, data = keys.pop("model")(), keys.pop("data")()
    micro_batches = int(os.environ.get("WORLD_SIZE", "1")) * keys.get("gradient_accumulation_steps", 1)
    args = arguments(
        folder,
        strategy="gradual",
        optim="sgd",
        learning_rate=0.05,
        head_learning_rate=0.5,
        layer_lr_decay=0.5,
        per_device_train_batch_size=8 // micro_batches,
        logging_steps=2,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        **keys,
    )
    trainer = TransferTrainer(model, args, train_dataset=data, eval_dataset=data)
    compare = CompareRanks(trainer)
    trainer.add_callback(compare)
    trainer.train()
    worst = torch.tensor([compare.worst])
    if dist.is_initialized():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    assert compare.compared > len(trainer.stage_records)
    return {"stages": len(trainer.stage_records), "ranks": worst.item(), "processes": args.world_size}, trainer


def main(folder: Path) -> None:
    results = {}
    for case in CASES:
        results[case], trainer = run(case, folder)
        if trainer.is_world_process_zero():
            torch.save(copy_state(trainer.model), folder / f"{case}.pt")
    if trainer.is_world_process_zero():
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()  # gloo's threads abort a process that ends without this, now and then
