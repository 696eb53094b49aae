"""Which modules an adapter goes into, inferred from layer groups, module types and a forward pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_transfer.adapters import bottleneck
from hf_transfer.errors import UserError, nearest
from hf_transfer.layers.architectures import STEM
from hf_transfer.layers.forward_pass import called_modules
from hf_transfer.layers.groups import LayerGroup

DENSE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
LINEAR = (nn.Linear, Conv1D)
# Layer types that each peft method can adapt; methods not listed get linear layers.
HOSTS: dict[str, tuple[type[nn.Module], ...]] = {
    "LORA": DENSE,
    bottleneck.KIND: DENSE,
    "IA3": (nn.Linear, Conv1D, nn.Conv2d),
    "LOHA": (nn.Linear, nn.Conv2d),
    "LOKR": (nn.Linear, nn.Conv2d),
}


def targets(
    model: nn.Module, groups: Sequence[LayerGroup], kind: str, wanted: Sequence[str] | None = None
) -> list[str]:
    """Full names of the modules to adapt.

    Args:
        model: a model without an adapter.
        groups: its layer groups.
        kind: peft_type of the method.
        wanted: full names, suffixes of names or regular expressions; None selects every module of the blocks that the
            method can adapt (for LN_TUNING every normalization layer of the backbone).

    Raises:
        UserError: no module matches (the message lists possible names), or a selected module is never called.
    """
    hosts = _hosts(model, groups, kind)
    if wanted and list(wanted) != ["all-linear"]:
        return _chosen(model, groups, hosts, wanted)
    if not hosts:
        raise UserError(
            f"adapter: the blocks of {type(model).__name__} have no module that {kind} can adapt "
            f"({', '.join(t.__name__ for t in HOSTS.get(kind, LINEAR)) if kind != 'LN_TUNING' else 'norms'}).",
            f"They contain {', '.join(_kinds(model, groups))}; adapter: lora adapts linear layers and convolutions.",
        )
    return hosts


def _hosts(model: nn.Module, groups: Sequence[LayerGroup], kind: str) -> list[str]:
    """The modules that `kind` adapts by default."""
    group_of = {n: g for g in groups for n in g.parameters}
    allowed = groups[:-1] if kind == "LN_TUNING" else groups[:-1] if len(groups) < 3 else _blocks(groups)
    hosts = []
    for name, module in model.named_modules():
        own = [group_of.get(f"{name}.{n}") for n, _ in module.named_parameters(recurse=False)]
        if own and all(g in allowed for g in own) and _fits(module, kind):
            hosts.append(name)
    called = called_modules(model, hosts) if kind != "LN_TUNING" else None
    return [n for n in hosts if called is None or n in called]


def _blocks(groups: Sequence[LayerGroup]) -> Sequence[LayerGroup]:
    return groups[1:-1] if groups[0].name in (STEM, "embeddings") else groups[:-1]


def _fits(module: nn.Module, kind: str) -> bool:
    if kind == "LN_TUNING":
        sizes = [p.ndim for p in module.parameters(recurse=False)]
        return "norm" in type(module).__name__.lower() and bool(sizes) and max(sizes) == 1
    if not isinstance(module, HOSTS.get(kind, LINEAR)):
        return False
    if isinstance(module, nn.Conv1d | nn.Conv2d):  # peft's convolution ignores dilation
        return module.groups == 1 and all(d == 1 for d in module.dilation)
    return True


def narrows(module: nn.Module) -> bool:
    """Whether a layer has fewer outputs than inputs."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels > module.out_channels
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows > columns) if isinstance(module, Conv1D) else (columns > rows)


def _chosen(model: nn.Module, groups: Sequence[LayerGroup], hosts: Sequence[str], wanted: Sequence[str]) -> list[str]:
    head = set(groups[-1].parameters)
    names = [
        name
        for name, module in model.named_modules()
        if name and not any(f"{name}.{n}" in head for n, _ in module.named_parameters())
    ]
    chosen: dict[str, None] = {}
    for pattern in wanted:
        selected = matching(pattern, names)
        if not selected:
            suffixes = list(dict.fromkeys(n.rpartition(".")[2] for n in hosts))
            raise UserError(
                f"lora_target_modules: {pattern!r} matches no module below the head.",
                f"Available suffixes: {', '.join(suffixes) or 'none'}.{nearest(pattern, suffixes)}",
            )
        chosen |= dict.fromkeys(selected)
    called = called_modules(model, list(chosen))
    unused = [n for n in chosen if called is not None and n not in called]
    if unused:
        raise UserError(
            f"lora_target_modules: the forward pass does not call {unused[0]!r}, so an adapter in it would have no "
            "effect."
        )
    return list(chosen)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The modules that an entry of `lora_target_modules` selects: by full name, suffix or regular expression."""
    return [n for n in names if n == pattern or n.endswith(f".{pattern}") or _matches(pattern, n)]


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _kinds(model: nn.Module, groups: Sequence[LayerGroup]) -> list[str]:
    """Class names of the modules below the head that have parameters."""
    owners = {n.rpartition(".")[0] for g in groups[:-1] for n in g.parameters}
    return sorted({type(m).__name__ for n, m in model.named_modules() if n in owners})
