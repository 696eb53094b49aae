"""Self-training on a target domain: in rounds, the model labels the target, and trains on what it was sure of.

The epochs are divided into equal parts, one more than there are rounds: the first is trained on the source alone, each
of the others begins with a round of labeling, whose labels take the place of earlier ones. Labels are data: an example
with one counts in the loss like an example of the source (`data.pseudo_labels`). They are part of every checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.config.arguments.adaptation import threshold_of
from hf_transfer.data.labels import IGNORED, SINGLE_LABEL
from hf_transfer.data.pseudo_labels import LabeledTargets, Round, label
from hf_transfer.errors import UserError, listed
from hf_transfer.objectives.losses import labels_of
from hf_transfer.training.answers import answers
from hf_transfer.training.running import RunningTrainer

FILE = "pseudo_labels.safetensors"  # in a checkpoint
KEY, ROUNDS = "domain_adaptation", "pseudo_label_rounds"
MOST_ROUNDS = 3  # where their number is not given


class SelfTraining(TrainerCallback):
    """Labels the target of a trainer before the first batch of some epochs.

    Attributes:
        targets: the target, as batches are made from it.
        plain: the same examples without augmentation, which are labeled.
        rounds: that have taken place.
        starts: epochs before which one takes place; empty before the number of epochs is known.
    """

    def __init__(self, trainer: RunningTrainer, targets: LabeledTargets):
        self.trainer, self.targets, self.plain = trainer, targets, targets.dataset
        self.rounds: list[Round] = []
        self.starts: tuple[int, ...] = ()

    def follow(self, epochs: int) -> None:
        """Divide so many epochs.

        Raises:
            UserError: there are fewer than parts.
        """
        asked = self.trainer.args.pseudo_label_rounds
        count = min(MOST_ROUNDS, epochs - 1) if asked is None else asked
        if epochs < max(count, 1) + 1:
            raise UserError(
                f"{asked or 'one'} round{'' if asked in (None, 1) else 's'} of labeling and the epoch before the first "
                f"need {(asked or 1) + 1} epochs, and the run has {epochs}.",
                "Train for more epochs" + (" or label in fewer rounds." if asked and asked > 1 else "."),
                key=ROUNDS,
            )
        self.starts = tuple(round(number * epochs / (count + 1)) for number in range(1, count + 1))

    @property
    def threshold(self) -> float | str:
        """A probability, or how a fraction is taken."""
        return threshold_of(self.trainer.args.pseudo_label_threshold)

    @property
    def in_words(self) -> str:
        """When the target is labeled, and what of it, for a printed plan."""
        when = f"labeled before epochs {listed([str(start + 1) for start in self.starts])}"
        threshold = self.threshold
        least = f"threshold {threshold}" if isinstance(threshold, str) else f"probability at least {threshold:g}"
        return f"{when if len(self.starts) > 1 else when.replace('epochs', 'epoch')}, {least}"

    @property
    def has_stopped(self) -> bool:
        """Whether the answers had collapsed in the last round."""
        return bool(self.rounds) and self.rounds[-1].collapsed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.global_step:  # not of an earlier `train()`
            self.rounds = []
            self.targets.set_labels(torch.full_like(self.targets.labels, IGNORED))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch = int(state.epoch or 0)
        self.targets.chance.epoch = epoch
        due = sum(start <= epoch for start in self.starts)
        if due > len(self.rounds) and not self.has_stopped:
            self._label(epoch)

    def _label(self, epoch: int) -> None:
        number = len(self.rounds) + 1
        labels, done = label(
            answers(self.trainer, self.plain),
            self.threshold,
            number / (len(self.starts) + 1),
            self.targets.counts,
            number,
            epoch,
        )
        self.rounds.append(done)
        self.targets.set_labels(torch.full_like(self.targets.labels, IGNORED) if done.collapsed else labels)
        logs = {f"pseudo_labels/{name}": value for name, value in _logged(done).items()}
        if (plan := self.trainer.plan) is not None:  # the epoch's stage, which a resumed run is in and this one not yet
            logs["stage"] = plan.at(self.trainer.state.global_step)
        self.trainer.log(logs)

    # ---- checkpoints ----

    def write(self, folder: Path) -> None:
        """Write labels and rounds to a checkpoint."""
        rounds = json.dumps([vars(one) for one in self.rounds])
        save_file({"labels": self.targets.labels.clone()}, folder / FILE, {"rounds": rounds})

    def restore(self, folder: str | Path) -> None:
        """Read them.

        Raises:
            UserError: the checkpoint has none, or those of another target.
        """
        path = Path(folder) / FILE
        if path.is_file():
            with safe_open(path, "pt") as file:
                labels, rounds = file.get_tensor("labels"), json.loads(file.metadata()["rounds"])
            if labels.shape == self.targets.labels.shape:
                self.rounds = [Round(**one) for one in rounds]
                self.targets.set_labels(labels)
                return
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} has no pseudo-labels of this target.",
            "Resume with the domain_adaptation keys of the original run.",
        )


def _logged(done: Round) -> dict[str, float]:
    numbers = {"round": done.number, "labeled": sum(done.labeled), "examples": sum(done.answered)}
    return {**numbers, "collapsed": float(done.collapsed), "entropy": done.entropy}


def attach(
    trainer: RunningTrainer, target: Any, lengths: tuple[torch.Tensor, torch.Tensor] | None = None
) -> SelfTraining:
    """Self-training for a trainer, whose target batches are made from.

    Args:
        trainer: with its objective.
        target: map-style dataset of target examples, as the model takes them.
        lengths: of the training examples and of the target's, in tokens, if they are known.

    Raises:
        UserError: the examples have not one class each.
    """
    loss = trainer.objective.loss
    assert loss is not None, "a trainer that adapts has the built-in loss"
    classes = labels_of(trainer.train_dataset, f"{KEY}: pseudo-label")
    if loss.problem_type != SINGLE_LABEL or not all(isinstance(one, int) and one >= 0 for one in classes):
        raise UserError(
            "pseudo-label needs one class per example, and the training set has others.",
            "Use mmd, coral or dann.",
            key=KEY,
        )
    args = trainer.args
    seed = args.seed if args.data_seed is None else args.data_seed
    trainer.targets = LabeledTargets(target, classes, seed, lengths)
    found = SelfTraining(trainer, trainer.targets)
    trainer.add_callback(found)
    return found


def epochs_of(num_steps: int, steps_per_epoch: int) -> int:
    """Epochs that begin within so many optimizer steps."""
    return math.ceil(num_steps / max(1, steps_per_epoch))
