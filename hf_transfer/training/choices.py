"""Keys that may be `auto` and that a trainer decides before training: the table of them, and what was decided.

A decision is made once per training set. Checkpoints and `run.yaml` hold it in place of `auto`, so that a resumed or
repeated run goes on with it, also where another version would decide otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hf_transfer.data import bucketing_choice
from hf_transfer.training import batchnorm, run_identity
from hf_transfer.training.running import RunningTrainer


class Choice(Protocol):
    """What a key comes to."""

    @property
    def value(self) -> Any:
        """The value that the run is repeated with."""

    def line(self) -> str:
        """For display; empty where there is nothing to say."""

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""


@dataclass(frozen=True)
class Decidable:
    """A key that may be `auto`.

    Attributes:
        choose: what a value of the key, `auto` or another, comes to.
        recalled: the choice of a value that a checkpoint holds, where this run would decide otherwise.
        before: the value of runs by versions without the key, and of plain `TrainingArguments`.
    """

    choose: Callable[[RunningTrainer, Any], Choice]
    recalled: Callable[[Any], Choice]
    before: Any


def _choose_bucketing(trainer: RunningTrainer, wanted: Any) -> Choice:
    if wanted != "auto":
        return bucketing_choice.Choice(wanted)
    return bucketing_choice.choose_for(
        trainer.train_dataset, vars(trainer.args), trainer._main_input, trainer._global_batch, trainer.args.world_size
    )


DECIDABLE: dict[str, Decidable] = {
    "length_bucketing": Decidable(
        _choose_bucketing,
        lambda was: bucketing_choice.Choice(was, "" if was else "it was off when the run began"),
        before=False,
    ),
    "batchnorm": Decidable(
        batchnorm.choose,
        lambda was: batchnorm.Choice(was, "as when the run began"),
        before="train",
    ),
}


class Choices:
    """What the keys of `DECIDABLE` come to for a trainer, by name."""

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self._made: dict[str, tuple[Any, Any, Choice]] = {}  # (training set, value of the key, choice)

    def __getitem__(self, name: str) -> Any:
        key, data, wanted = DECIDABLE[name], self.trainer.train_dataset, self._wanted(name)
        made = self._made.get(name)
        if made is None or made[0] is not data or made[1] != wanted:
            made = self._made[name] = data, wanted, key.choose(self.trainer, wanted)
        return made[2]

    def _wanted(self, name: str) -> Any:
        return vars(self.trainer.args).get(name, DECIDABLE[name].before)

    @property
    def values(self) -> dict[str, Any]:
        """The value of each key that the run is repeated with."""
        return {name: self[name].value for name in DECIDABLE}

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return {name: self[name].to_dict() for name in DECIDABLE}

    def recall(self, checkpoint: str | Path) -> None:
        """Let each key that is `auto` be what it was in the run that wrote a checkpoint."""
        state = run_identity.read(checkpoint)
        recorded = state["facts"]["keys"] if state else {}
        for name, key in DECIDABLE.items():
            was = recorded.get(name, key.before)
            if self._wanted(name) == "auto" and was != self[name].value:
                self._made[name] = self.trainer.train_dataset, "auto", key.recalled(was)
