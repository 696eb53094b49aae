"""The modules that a model is built of, one per layer group: what a backend may shard as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_transfer.layers.groups import LayerGroup


def block_classes(model: nn.Module, groups: Sequence[LayerGroup]) -> tuple[str, ...]:
    """Names of the classes of the model's blocks, in order of their first block.

    A block is the module with most parameters of those that lie within one group between stem and head. torch's own
    modules are none: other layers have their class too.

    Args:
        model: with or without an adapter.
        groups: its layer groups, input to head.
    """
    group_of = {name: group.name for group in groups[1:-1] for name in group.parameters}
    largest: dict[str, tuple[int, str]] = {}
    for path, module in model.named_modules():
        own = [(f"{path}.{name}" if path else name, p) for name, p in module.named_parameters()]
        owners = {group_of.get(name) for name, _ in own}
        if len(owners) != 1 or None in owners or type(module).__module__.startswith("torch.nn"):
            continue
        group, size = str(next(iter(owners))), sum(p.numel() for _, p in own)
        if size > largest.get(group, (0, ""))[0]:  # of modules with the same parameters the outermost
            largest[group] = size, type(module).__name__
    return tuple(dict.fromkeys(name for _, name in (largest[g.name] for g in groups[1:-1] if g.name in largest)))
