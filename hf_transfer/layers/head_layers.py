"""The layers of a model's head, in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from hf_transfer.layers.wrappers import core_of, plain_names, pretrained


def in_order(model: nn.Module, names: Collection[str]) -> list[str]:
    """Parameter names in the order of the forward pass.

    Some models define their classifier before the base model (XLM-RoBERTa).

    Args:
        model: with or without an adapter.
        names: of parameters of its head, as in `model.named_parameters()`.
    """
    chosen = [name for name, _ in model.named_parameters() if name in names]
    core, plain = pretrained(core_of(model)[1]), plain_names(model)
    inside = None if core is None or core.base_model is core else f"{core.base_model_prefix}."
    return chosen if inside is None else sorted(chosen, key=lambda name: not plain[name].startswith(inside))


def owners(names: Sequence[str]) -> list[str]:
    """The modules that hold these parameters, each once, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def ends_with_linear(model: nn.Module, paths: Sequence[str]) -> bool:
    """Whether the last of a head's modules is a linear layer that alone computes the logits.

    It is not alone if another linear layer has its shape and cannot feed it: the head ends with both (DeiT's teacher).
    """
    modules = [model.get_submodule(path) for path in paths]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    if not linear or linear[-1] is not modules[-1]:
        return False
    last = linear[-1]
    return not any(m.weight.shape == last.weight.shape and m.out_features != last.in_features for m in linear[:-1])


def shown(model: nn.Module, paths: Sequence[str]) -> str:
    """The modules with their types, for a message; `empty` without any."""
    return ", ".join(f"{path} ({type(model.get_submodule(path)).__name__})" for path in paths) or "empty"
