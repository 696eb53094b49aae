"""The layers of a model's head, and the last linear one, whose output is the logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.head_layers import ends_with_linear, in_order, owners, shown
from hf_transfer.training.running import RunningTrainer


@dataclass(frozen=True)
class HeadLayers:
    """The modules of a head with trainable parameters.

    Attributes:
        paths: their names in the model, in the order of the forward pass.
        last: the last of them, if it is one linear layer; None if it is not, or if it stands beside another.
        shown: all of them, for a message.
    """

    paths: tuple[str, ...]
    last: nn.Linear | None
    shown: str


def head_layers(trainer: RunningTrainer) -> HeadLayers:
    """The layers of the head of a trainer's model.

    Raises:
        UserError: the trainer has no plan, and the layers of its model are not known.
    """
    model, paths = trainer.model, owners(head_parameters(trainer))
    last = model.get_submodule(paths[-1]) if ends_with_linear(model, paths) else None
    assert last is None or isinstance(last, nn.Linear)
    return HeadLayers(tuple(paths), last, shown(model, paths))


def head_parameters(trainer: RunningTrainer) -> list[str]:
    """Names of the head's trainable parameters, in the order of the forward pass.

    Some models define their classifier before the base model (XLM-RoBERTa).

    Raises:
        UserError: the trainer has no plan, and the layers of its model are not known.
    """
    groups = trainer.layer_groups or layer_groups(trainer.model, trainer.args.layer_rules or ())
    own, eligible = set(groups[-1].parameters), set(trainer.trainable)
    names = [
        name
        for name, parameter in trainer.model.named_parameters()
        if name in own and (name in eligible if eligible else parameter.requires_grad)
    ]
    return in_order(trainer.model, names)
