"""The head that a run's checkpoint came with, for the task that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.data.replay import least_batch
from hf_transfer.errors import UserError, listed, named
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.hashing import key, tensor_digest
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.load import Loaded
from hf_transfer.models.source import read_config
from hf_transfer.objectives.replayed import answer
from hf_transfer.runs.teacher import as_saved
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task
from hf_transfer.training import keeping
from hf_transfer.training.trainer import TransferTrainer

REPLAY = "replay_dataset_name"
_NEAR = 1e-3  # relative to the largest logit


def with_own_head(config: Config, task: Task) -> tuple[Loaded, Any]:
    """(a run's checkpoint with the head and the labels that it came with, its tokenizer or image processor).

    What the checkpoint lacks is random (`fresh`). The random numbers of the run stay as they are.
    """
    keys = as_saved(config.model)
    with torch.random.fork_rng(devices=[]):
        loaded: tuple[Loaded, Any] = task.load(keys, config.data, Labels.of(read_config(keys)))
    return loaded


@dataclass
class OldHead:
    """The head of a run's checkpoint, of other labels than the run's.

    Attributes:
        name: of the checkpoint.
        loaded: the checkpoint with that head.
    """

    name: str
    loaded: Loaded

    @classmethod
    def of(cls, config: Config, task: Task, error: UserError) -> OldHead:
        """Load it.

        Args:
            config: of the run.
            task: what the model reads.
            error: that the examples have labels which the run does not have.

        Raises:
            UserError: the checkpoint has no head either.
        """
        name = str(config.model.model_name_or_path)
        loaded, _ = with_own_head(config, task)
        if loaded.fresh:
            raise UserError(
                error.problem,
                f"{error.fix} Labels of this run can be replayed, or of a head that the checkpoint came with: "
                f"{name!r} has none ({listed(loaded.fresh, 2)} would be random).",
                REPLAY,
            ) from error
        return cls(name, loaded)

    @property
    def digest(self) -> str:
        """To recognize the head by."""
        return key({name: tensor_digest(tensor) for name, tensor in self._weights().items()})

    def _weights(self) -> dict[str, torch.Tensor]:
        """Its parameters by plain name."""
        model = self.loaded.model
        names, own = plain_names(model), dict(model.named_parameters())
        head = layer_groups(model)[-1].parameters
        return {names[n]: own[n].detach() for n in head if ".original_module." not in n}  # what peft put aside

    def refused(self, error: UserError) -> UserError:
        """The error of examples that have labels neither of the run nor of this head."""
        labels = named(self.loaded.labels.names, 4)
        return UserError(
            error.problem, f"{error.fix} The head of {self.name!r} does not have them all either ({labels}).", REPLAY
        )

    def put(self, trainer: TransferTrainer, batch: Mapping[str, Any]) -> None:
        """Add its loss on replayed examples to the objective of a trainer, whose model is the checkpoint as yet.

        Args:
            trainer: before its plan is resolved.
            batch: any examples, to see that the head reads what it was trained on.

        Raises:
            UserError: it does not, or a batch may have no other examples.
        """
        args, model, old = trainer.args, trainer.model, self.loaded.model
        least = least_batch(args.replay_fraction)
        if args.per_device_train_batch_size < least:
            raise UserError(
                f"with {args.replay_fraction:g} of each batch, a batch of {args.per_device_train_batch_size} may have "
                "replayed examples alone, which have labels of another head.",
                f"Set per_device_train_batch_size to {least} or more.",
                key="replay_fraction",
            )
        if args.auto_find_batch_size:
            raise UserError(
                f"replay under an old head needs batches of {least} or more, and auto_find_batch_size may halve them.",
                "Leave it out, and set per_device_train_batch_size.",
                key="auto_find_batch_size",
            )
        values = {name: tensor.to(args.device) for name, tensor in self._weights().items()}
        plain = plain_names(model)
        head = {n: values[plain[n]] for n in keeping.head_of(trainer) if plain[n] in values}
        batch = {n: v.to(args.device) for n, v in batch.items() if n != LABELS}
        if len({plain[n] for n in head}) < len(values) or not _same(model, head, old.to(args.device), batch):
            raise UserError(
                f"the head of {self.name!r} cannot read what this run's head reads.",
                "Leave head, pooling, pooling_layer and from_scratch as the checkpoint has them.",
                key=REPLAY,
            )
        old.to("cpu")
        keeping.replay_with(trainer, head, self.loaded.labels.problem_type)


@torch.no_grad()
def _same(model: Any, head: Mapping[str, torch.Tensor], old: Any, batch: Mapping[str, Any]) -> bool:
    """Whether the model answers with the head as the checkpoint does."""
    modes = {one: one.training for one in (model, old)}
    try:
        for one in modes:
            one.eval()
        mine, wanted = answer(model, head, batch).float(), answer(old, {}, batch).float()
    finally:
        for one, mode in modes.items():
            one.train(mode)
    return mine.shape == wanted.shape and bool((mine - wanted).abs().max() <= _NEAR * wanted.abs().max().clamp(min=1))
