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

from hf_transfer.settings import Config
from hf_transfer.training.checkpoints import newest_valid
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
