"""BatchNorm in layers that train: statistics of the batches, or the checkpoint's. What `batchnorm` comes to.

In train mode BatchNorm normalizes by the batch and moves its running statistics, by which it normalizes in eval mode.
Few examples or small batches estimate them badly, and the model is evaluated by others than it trained with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from hf_transfer.errors import UserError
from hf_transfer.layers.frozen import pretrained_statistics, running_statistics
from hf_transfer.training.running import RunningTrainer

SMALL_BATCH = 16  # examples that a layer normalizes by, below which `auto` keeps the checkpoint's statistics
FEW_EXAMPLES = 1000  # training examples, below which `auto` keeps them


@dataclass(frozen=True)
class Choice:
    """What BatchNorm of layers that train normalizes by.

    Attributes:
        value: frozen (the checkpoint's statistics) or train (the batch's).
        why: the reason, as part of a sentence; empty where there is nothing to say.
    """

    value: str
    why: str = ""

    def line(self) -> str:
        """For display; empty where there is nothing to say."""
        return f"batchnorm: {self.value}: {self.why}" if self.why else ""

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return asdict(self)


def pretrained(trainer: RunningTrainer) -> frozenset[str]:
    """Names of the layers whose statistics a checkpoint brought; called by all processes, which agree.

    Raises:
        UserError: `batchnorm: frozen`, and the statistics of all layers are those of a new model.
    """
    model, args = trainer.model, trainer.args
    if not running_statistics(model):
        return frozenset()
    (names,) = broadcast_object_list([pretrained_statistics(model)])  # the others may have no weights yet
    if args.batchnorm == "frozen" and not names:
        raise UserError(
            "frozen keeps the checkpoint's running statistics, and this model has none to keep: the weights are random "
            "(mean 0 and variance 1 in every BatchNorm layer).",
            "Set batchnorm: train.",
            key="batchnorm",
        )
    return names


def choose(trainer: RunningTrainer, wanted: str) -> Choice:
    """What `batchnorm` comes to for a model and its training set.

    Args:
        trainer: with both.
        wanted: value of the key.
    """
    if wanted != "auto":
        has_none = wanted == "frozen" and not running_statistics(trainer.model)
        return Choice(wanted, "no effect, because the model has no BatchNorm" if has_none else "")
    live = _live(trainer)
    if not live:
        return Choice("train")
    if not trainer.pretrained_statistics.intersection(live):
        return Choice("train", "random weights have no statistics to keep")
    size = _examples_per_layer(trainer, live)
    count = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    if count is not None and count < FEW_EXAMPLES:
        return Choice("frozen", f"{count:,} training examples")
    if size < SMALL_BATCH:
        return Choice("frozen", f"batches of {size}")
    examples = "a stream of" if count is None else f"{count:,}"
    return Choice("train", f"{examples} training examples in batches of {size}")


def _live(trainer: RunningTrainer) -> dict[str, nn.Module]:
    """The layers that update running statistics in some stage unless `batchnorm` keeps them, by name."""
    layers, live = running_statistics(trainer.model), dict[str, nn.Module]()
    if trainer.plan is None or not layers:
        return live
    for stage in trainer.plan.stages:
        with trainer.unfreezing.training_as_in(stage, keeping=()):
            frozen = {id(module) for module in trainer.unfreezing.frozen}
        live |= {name: module for name, module in layers.items() if id(module) not in frozen}
    return live


def _examples_per_layer(trainer: RunningTrainer, live: dict[str, nn.Module]) -> int:
    """Examples that a layer normalizes by: the batch of a device; SyncBatchNorm's is that of all processes."""
    args = trainer.args
    whole = args.per_device_train_batch_size * (1 if args.accelerator_config.split_batches else args.world_size)
    is_shared = all(isinstance(module, nn.SyncBatchNorm) for module in live.values())
    return whole if is_shared else max(1, whole // args.world_size)
