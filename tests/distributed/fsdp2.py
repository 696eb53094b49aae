"""Gradual unfreezing of a model that FSDP 2 has in shards.

torch shards on a CPU; accelerate offers FSDP on accelerators only, so that it is told otherwise here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import TrainerCallback

from hf_transfer import TransferTrainer
from tests.helpers import arguments, texts, tiny_bert

LAYERS = ("embeddings", "layer.0", "layer.1", "classifier")


class Moves(TrainerCallback):
    """By stage, the layers whose parameters moved in it."""

    def __init__(self, trainer: TransferTrainer):
        self.trainer, self.before, self.moved = trainer, {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.whole()

    def on_step_end(self, args, state, control, **kwargs):
        stage, after = self.trainer.unfreezing.stage, self.whole()
        changed = {layer for layer in LAYERS for n in after if layer in n and not after[n].equal(self.before[n])}
        self.moved[stage] = sorted(set(self.moved.get(stage, [])) | changed)

    def whole(self) -> dict[str, torch.Tensor]:
        parts = dict(self.trainer.model.named_parameters())
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in parts.items()}


def run(folder: Path, batch_size: int, resumed: str | None = None) -> dict[str, Any]:
    args = arguments(
        folder,
        strategy="gradual",
        num_train_epochs=4,
        optim="sgd",
        learning_rate=0.05,
        per_device_train_batch_size=batch_size,
        train_sampling_strategy="sequential",
        save_strategy="epoch",
    )
    trainer = TransferTrainer(tiny_bert(layers=2), args, train_dataset=texts(32))
    moves = Moves(trainer)
    trainer.add_callback(moves)
    trainer.train(resume_from_checkpoint=resumed)
    if trainer.is_fsdp_enabled:  # the blocks of the layer groups
        assert trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == ["BertLayer"]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"losses": losses, "moved": list(moves.moved.values()), "kind": type(trainer.model).__name__}


def allow_on_a_cpu() -> None:
    ordinary = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        ordinary(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    plugin = FullyShardedDataParallelPlugin.__init__

    def version_2(self: Any, *args: Any, **kwargs: Any) -> None:
        plugin(
            self,
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )

    FullyShardedDataParallelPlugin.__init__ = version_2


def in_shards(folder: Path) -> None:
    """On each of two ranks. Writes the logged losses, also of a run resumed in the middle, and which layers moved in
    each stage."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    allow_on_a_cpu()
    outcome = run(folder, 4)
    outcome["resumed"] = run(folder, 4, str(folder / "checkpoint-8"))["losses"]
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()
