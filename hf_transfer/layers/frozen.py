"""Which modules are frozen and must be in eval mode."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from hf_transfer.layers.groups import LayerGroup
from hf_transfer.layers.wrappers import core_of

_STATISTICS = ("running_mean", "running_var")


def frozen_modules(model: nn.Module, groups: Sequence[LayerGroup], keeping: Collection[str] = ()) -> list[nn.Module]:
    """The modules that must be in eval mode, given which parameters currently require gradients.

    A module is frozen if no parameter in its subtree trains. A module without parameters (dropout, BatchNorm without
    affine parameters) follows its parent; if the parent spans several groups, it follows the next group, so that
    dropout between a frozen stem and frozen blocks is off and dropout before the head is on. In a model with an
    adapter, normalization layers with running statistics are frozen unless the adapter saves them.

    Args:
        model: the model.
        groups: its layer groups.
        keeping: names of layers that stay in eval mode also where they train, such as `pretrained_statistics` names.
    """
    index = {name: i for i, group in enumerate(groups) for name in group.parameters}
    group_of = {id(p): index[n] for n, p in model.named_parameters()}  # by identity: a tied parameter is in one group
    group_trains = {group_of[id(p)] for p in model.parameters() if p.requires_grad}
    frozen: list[nn.Module] = []
    saved = {id(m) for n, p in model.named_modules() if n.endswith(".modules_to_save") for m in p.modules()}
    is_adapted = core_of(model)[1] is not model
    kept = {id(module) for name, module in model.named_modules() if name in keeping}

    def first_group(module: nn.Module) -> int | None:
        return next((group_of[id(p)] for p in module.parameters()), None)

    def visit(module: nn.Module, inherited: bool) -> None:
        own = list(module.parameters())
        if not (any(p.requires_grad for p in own) if own else inherited):
            frozen.extend(module.modules())
            return
        if id(module) in kept or (is_adapted and "running_mean" in module._buffers and id(module) not in saved):
            frozen.append(module)
        spans = len({group_of[id(p)] for p in own}) > 1
        children = list(module.children())
        for i, child in enumerate(children):
            follows = True
            if spans and first_group(child) is None:
                later = (first_group(c) for c in children[i + 1 :])
                follows = next((g for g in later if g is not None), group_of[id(own[-1])]) in group_trains
            visit(child, follows)

    visit(model, True)
    return frozen


def running_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that update running statistics in train mode, by name: BatchNorm of every kind and library.

    They have a momentum next to their statistics. A FrozenBatchNorm, as detection models have it, has none.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if "momentum" in vars(module) and any(module._buffers.get(kind) is not None for kind in _STATISTICS)
    }


def pretrained_statistics(model: nn.Module) -> frozenset[str]:
    """Names of those of `running_statistics` that were ever updated: a new layer has mean 0 and variance 1."""
    names = set()
    for name, module in running_statistics(model).items():
        mean, variance = (module._buffers.get(kind) for kind in _STATISTICS)
        if not (_is_all(mean, 0) and _is_all(variance, 1)):
            names.add(name)
    return frozenset(names)


def _is_all(statistic: torch.Tensor | None, value: float) -> bool:
    return statistic is None or (not statistic.is_meta and bool((statistic == value).all()))
