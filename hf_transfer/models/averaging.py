"""Averages and interpolations of the weights of models, computed in float64."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from hf_transfer.layers.frozen import running_statistics

State = dict[str, torch.Tensor]


class Mean:
    """The mean of several states, one after the other.

    Tensors that are not floating point (a count of batches, positions) are those of the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: State = {}
        self._kinds: dict[str, torch.dtype] = {}

    def including(self, state: Mapping[str, torch.Tensor]) -> Mean:
        """A mean of one state more."""
        other = Mean()
        other.count, other._kinds = self.count + 1, self._kinds or {n: t.dtype for n, t in state.items()}
        for name, tensor in state.items():
            own = self._sum.get(name)
            if not tensor.is_floating_point():
                other._sum[name] = tensor if own is None else own
            else:
                other._sum[name] = tensor.double() if own is None else own + tensor.double()
        return other

    def state(self) -> State:
        """The mean, in the types of the first state."""
        return {
            name: (total / self.count if total.is_floating_point() else total).to(self._kinds[name])
            for name, total in self._sum.items()
        }


def interpolate(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], alpha: float, kept: Collection[str] = ()
) -> State:
    """(1 - alpha) · one + alpha · other; at 0 and 1 exactly one of them.

    Args:
        one: a state.
        other: a state, with the names of `one` and perhaps more.
        alpha: weight of `other`.
        kept: names of tensors that are those of `other` for every alpha, as are those that `one` lacks.
    """
    mixed = dict(other)
    for name in one.keys() - set(kept):
        start, end = one[name], other[name]
        if end.is_floating_point() and alpha != 1:
            mixed[name] = (start.double() * (1 - alpha) + end.double() * alpha).to(end.dtype)
    return mixed


def moved_statistics(model: nn.Module, states: Iterable[Mapping[str, torch.Tensor]]) -> list[str]:
    """Names of the BatchNorm layers of a model whose running statistics differ between states."""
    first, moved = None, dict[str, None]()
    names = [n for n, m in running_statistics(model).items() if m._buffers.get("running_mean") is not None]
    for state in states:
        first = first or {n: state[f"{n}.running_mean"] for n in names}
        moved |= dict.fromkeys(n for n in names if not torch.equal(first[n], state[f"{n}.running_mean"]))
    return list(moved)


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, layers: Collection[str], batches: Iterable[Mapping[str, torch.Tensor]]
) -> None:
    """Compute the running statistics of BatchNorm layers anew: their mean over batches, the rest in eval mode.

    Those of averaged weights are not the average of the statistics (Izmailov et al. 2018, arXiv:1803.05407, section
    3.2), because activations are not linear in the weights.

    Args:
        model: left in eval mode.
        layers: names of the layers.
        batches: model inputs without labels.
    """
    model.eval()
    modules = [model.get_submodule(name) for name in layers]
    momenta = [vars(module)["momentum"] for module in modules]
    for module in modules:
        module.reset_running_stats()  # type: ignore[operator]
        module.momentum = None  # type: ignore[assignment]  # a cumulative mean
        module.train()
    try:
        for batch in _on(next(model.parameters()).device, batches):
            model(**batch)
    finally:
        for module, momentum in zip(modules, momenta, strict=True):
            module.momentum = momentum
        model.eval()


def _on(device: torch.device, batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}
