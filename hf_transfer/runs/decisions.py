"""Training arguments that a run decides itself: the only place that changes them.

Functions such as `machine.choose_loader` return what they decided, as values by name of the argument; `with_decisions`
applies them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer.settings import Config, keys
from hf_transfer.training import run_identity
from hf_transfer.training.checkpoints import newest_valid
from hf_transfer.training.choices import DECIDABLE
from hf_transfer.training.trainer import TransferTrainer

Decisions = dict[str, Any]


def with_decisions(config: Config, *decisions: Mapping[str, Any]) -> Config:
    """The configuration with other training arguments; `config` itself stays as it is.

    The arguments are copied instead of created anew: creating them would derive other arguments a second time.
    """
    training = copy.copy(config.training)
    for decision in decisions:
        for name, value in decision.items():
            assert hasattr(training, name), name
            setattr(training, name, value)
    return replace(config, training=training)


def with_choices(config: Config, trainer: TransferTrainer, checkpoint: str | None) -> Config:
    """The configuration with what the trainer decided in place of `auto`, so that a repeated run decides nothing.

    Args:
        config: of the run.
        trainer: decides.
        checkpoint: the folder to resume from, or "auto", if any: the run that wrote it has decided.
    """
    found = newest_valid(Path(str(trainer.args.output_dir)))[0] if checkpoint == "auto" else checkpoint
    if found is not None:
        trainer.choices.recall(found)
    own = {"logging_steps": trainer.args.logging_steps}
    return replace(config, values=config.values | trainer.choices.values | own)


def recorded(checkpoint: str | None, folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of the run that wrote it; None without one, and where plain Trainer wrote it.

    Args:
        checkpoint: its folder, or "auto" for the newest valid one.
        folder: of the run.
    """
    found_in = newest_valid(folder)[0] if checkpoint == "auto" else checkpoint
    return run_identity.read(found_in) if found_in else None


_UNSAID = {"effort": "what it sets is in this file"}  # of choices without a reason
_FOUND = (
    "task",
    "problem_type",
    "label_column_name",
    "label_delimiter",
    "label_vector_names",
    "text_column_name",
    "image_column_name",
    "pixel_range",
)


def reasons(
    config: Config, chosen: Mapping[str, str], trainer: TransferTrainer, asked: Mapping[str, str]
) -> dict[str, str]:
    """Why a run has the values of the keys that were not given, by key, for `run.yaml`.

    Args:
        config: of the run, with what was chosen.
        chosen: reasons of what `strategy: auto` chose.
        trainer: with a resolved plan.
        asked: reasons of what `auto` of other keys came to, `calibrate` for one.
    """
    values, args, steps = config.values, trainer.args, trainer.num_steps
    why = dict.fromkeys(_FOUND, "found in the data") | {
        "train_val_split": "the data has no validation split",
        "output_dir": "a new folder",
        "num_train_epochs": "the sum of stages",
        "learning_rate": "of the strategy",
        "fp16": "what mixed_precision comes to",
        "bf16": "what mixed_precision comes to",
        "from_scratch": "of the strategy",
        "adapter": "of the strategy",
        "logging_steps": f"{-(-steps // max(1, int(args.logging_steps)))} lines in {steps} steps",
    }
    why = {name: reason for name, reason in why.items() if name not in config.given}
    why = {name: reason for name, reason in why.items() if values[name] != keys()[name].default}
    decided = {name: trainer.choices[name].why for name in DECIDABLE if getattr(args, name) == "auto"}
    decided |= {name: reason for name, reason in asked.items() if getattr(args, name) == "auto"}
    decided |= chosen
    return why | {name: reason or _UNSAID.get(name, "what auto comes to") for name, reason in decided.items()}
