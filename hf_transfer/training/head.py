"""The layers of a model's head, and the last linear one, whose output is the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.wrappers import core_of, plain_names, pretrained
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
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in head_parameters(trainer)))
    modules = [trainer.model.get_submodule(path) for path in paths]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    is_last = bool(linear) and linear[-1] is modules[-1] and not any(map(_beside(linear[-1]), linear[:-1]))
    shown = ", ".join(f"{path} ({type(m).__name__})" for path, m in zip(paths, modules, strict=True))
    return HeadLayers(tuple(paths), linear[-1] if is_last else None, shown or "empty")


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
    model, plain = pretrained(core_of(trainer.model)[1]), plain_names(trainer.model)
    inside = None if model is None or model.base_model is model else f"{model.base_model_prefix}."
    return names if inside is None else sorted(names, key=lambda name: not plain[name].startswith(inside))


def _beside(last: nn.Linear) -> Callable[[nn.Linear], bool]:
    """Whether a layer cannot feed `last` and has its shape: the head ends with both (DeiT's teacher)."""
    return lambda layer: layer.weight.shape == last.weight.shape and layer.out_features != last.in_features
