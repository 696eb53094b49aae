"""A finished run at work, and what its card records beyond the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_transfer.data.record import Record
from hf_transfer.hub import card
from hf_transfer.inference.predictor import Predictor
from hf_transfer.run_folder import EXAMPLES
from hf_transfer.runs.facts import base_of
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer


def card_facts(prepared: Prepared, trainer: TransferTrainer, split: str) -> dict[str, Any]:
    """What the card needs; `split` is the one that the metrics are of."""
    return card.facts(
        prepared.config.values,
        prepared.data,
        base_of(prepared.config, trainer.model),
        split,
        model_origin=prepared.loaded.origin,
        data_origin=prepared.source.origin,
    )


def predictor_of(prepared: Prepared, trainer: TransferTrainer, folder: Path) -> Predictor:
    """The trained model at work; `folder` is the run's."""
    config, args = prepared.config, prepared.config.training
    return Predictor(
        task=prepared.task,
        model=trainer.model,
        processor=prepared.processor,
        labels=prepared.loaded.labels,
        data=config.data,
        batch_size=args.per_device_eval_batch_size,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        seed=config.split_seed,
        record=Record.load(folder / EXAMPLES),
        folder=folder,
    )
