"""Optimizer parameter groups and learning-rate schedules from a Plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from hf_transfer.plan.plan import Group, Plan


def parameter_groups(
    model: nn.Module, groups: Sequence[Group], plan: Plan, weight_decay: float, no_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Optimizer groups for every parameter that any stage of `plan` trains, input to head.

    All groups exist from step 0, so that optimizer and scheduler never change shape. Parameters with the same rate in
    every stage and the same weight decay share a group. Parameters that did not require a gradient when the groups were
    made stay out (a base model under adapters).

    Args:
        model: the model whose `named_parameters()` the groups name.
        groups: its layer groups.
        plan: the plan.
        weight_decay: applied to parameters of two or more dimensions that `no_decay` does not name.
        no_decay: parameter names that are never decayed.

    Returns:
        Dictionaries with `params`, `weight_decay`, `lr` (the rate in the first stage that trains them), `layers` (the
        names of the layer groups in it) and `rates` (one per stage, 0.0 where frozen).
    """
    parameters = dict(model.named_parameters())
    merged: dict[tuple[tuple[float, ...], float], dict[str, Any]] = {}
    for group in groups:
        for name in group.parameters:
            parameter = parameters[name]
            rates = plan.trajectory(group.name, name)
            if not parameter.requires_grad or not any(rates):
                continue
            decay = weight_decay if _is_matrix(parameter) and name not in no_decay else 0.0
            entry = merged.setdefault(
                (rates, decay),
                {
                    "params": [],
                    "lr": next(r for r in rates if r),
                    "weight_decay": decay,
                    "rates": rates,
                    "layers": [],
                },
            )
            entry["params"].append(parameter)
            if group.name not in entry["layers"]:
                entry["layers"].append(group.name)
    return list(merged.values())


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it has two dimensions or more; a vector that only broadcasts, as (1, 1, 1, C), has one."""
    return parameter.ndim == 2 or sum(size > 1 for size in parameter.shape) > 1


def lr_factors(
    plan: Callable[[], Plan], group: dict[str, Any], schedule: Callable[[int], float]
) -> Callable[[int], float]:
    """The factor on an optimizer group's `lr` at each step: its stage's rate and warm-up, times the run's schedule.

    At step t of T this gives rate * schedule(t/T) * min(1, (t - t_thaw) / unfreeze_warmup_steps). `plan` is asked at
    each step, since a plateau decides late where a stage begins. A plain closure: `LambdaLR` would put a callable
    object's attributes into the checkpoint and restore them from there.
    """
    base, rates = group["lr"], group["rates"]

    def factor(step: int) -> float:
        return schedule(step) * (plan().rate(step, rates) / base)

    return factor


def current_rates(param_groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """{layer group: learning rate} from optimizer groups, input to head; 0.0 where the layer is frozen.

    Where a pattern gives a part of a layer group a rate of its own, that part has a number behind the name.
    """
    parts: dict[str, dict[tuple[float, ...], float]] = {}
    for group in param_groups:
        for layer in group["layers"]:
            parts.setdefault(layer, {})[tuple(group["rates"])] = float(group["lr"])
    return {
        layer if i == 0 else f"{layer}#{i + 1}": rate
        for layer, rates in parts.items()
        for i, rate in enumerate(rates.values())
    }
