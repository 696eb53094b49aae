"""Which modules are frozen and must be in eval mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_transfer.layers.groups import LayerGroup
from hf_transfer.layers.wrappers import core_of


def frozen_modules(model: nn.Module, groups: Sequence[LayerGroup]) -> list[nn.Module]:
    """The modules that must be in eval mode, given which parameters currently require gradients.

    A module is frozen if no parameter in its subtree trains. A module without parameters (dropout, BatchNorm without
    affine parameters) follows its parent; if the parent spans several groups, it follows the next group, so that
    dropout between a frozen stem and frozen blocks is off and dropout before the head is on. In a model with an
    adapter, normalization layers with running statistics are frozen unless the adapter saves them.

    Args:
        model: the model.
        groups: its layer groups.
    """
    index = {name: i for i, group in enumerate(groups) for name in group.parameters}
    group_of = {id(p): index[n] for n, p in model.named_parameters()}  # by identity: a tied parameter is in one group
    group_trains = {group_of[id(p)] for p in model.parameters() if p.requires_grad}
    frozen: list[nn.Module] = []
    saved = {id(m) for n, p in model.named_modules() if n.endswith(".modules_to_save") for m in p.modules()}
    is_adapted = core_of(model)[1] is not model

    def first_group(module: nn.Module) -> int | None:
        return next((group_of[id(p)] for p in module.parameters()), None)

    def visit(module: nn.Module, inherited: bool) -> None:
        own = list(module.parameters())
        if not (any(p.requires_grad for p in own) if own else inherited):
            frozen.extend(module.modules())
            return
        if is_adapted and "running_mean" in module._buffers and id(module) not in saved:
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
