"""Ours and plain Trainer under one clock."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from hf_transfer import TransferArguments, TransferTrainer

from .race import Clock, Outcome


def no_freeze(model: PreTrainedModel) -> None:
    """Everything trains."""


def fit(
    model: PreTrainedModel,
    prepare: Callable[[], tuple[Dataset, Any]],
    seed: int,
    options: argparse.Namespace,
    batch: int,
    keys: dict[str, Any],
    freeze: Callable[[PreTrainedModel], None] | None = None,
    finished: Callable[[Any], None] = lambda trainer: None,
    **more: Any,
) -> Outcome:
    """Train `model`: with plain Trainer where `freeze` is given, else with ours.

    Args:
        model: already loaded.
        prepare: from raw examples to (training set, collator), under the clock.
        seed: of order and dropout.
        options: of the command line: the number of epochs.
        batch: examples per step.
        keys: of `TrainingArguments` or `TransferArguments`.
        freeze: what a script calls before it makes its Trainer; `no_freeze` for nothing.
        finished: called with the trainer after the clock has stopped.
        more: for the trainer.
    """
    plain = freeze is not None
    trainer_class, arguments_class = (Trainer, TrainingArguments) if plain else (TransferTrainer, TransferArguments)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "num_train_epochs": options.epochs,
            "per_device_train_batch_size": batch,
            "seed": seed,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **keys,
        }
        with Clock() as clock:
            if freeze is not None:
                freeze(model)
            data, collator = prepare()
            trainer = trainer_class(
                model, arguments_class(**arguments), train_dataset=data, data_collator=collator, **more
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        finished(trainer)
        # Of ours what the last stage trained; `train` gives back what it froze.
        trained = trainer.plan.stages[-1].num_trainable if not plain and trainer.plan is not None else _trained(model)
        return {**clock.outcome, "trained": trained, "steps": trainer.state.global_step}


def _trained(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def accuracy(logits: Callable[[Any], torch.Tensor], batches: Sequence[tuple[Any, torch.Tensor]]) -> float:
    """Share of right answers, by one code for all sides."""
    right = total = 0
    with torch.no_grad():
        for inputs, labels in batches:
            right += int((logits(inputs).argmax(-1) == labels).sum())
            total += len(labels)
    return right / total
