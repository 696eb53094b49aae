"""Optimizer parameter groups and learning-rate factors for a Plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from hf_transfer.plan.plan import Group, Plan


def parameter_groups(
    model: nn.Module, groups: Sequence[Group], plan: Plan, weight_decay: float, no_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Optimizer groups for every parameter that any stage of `plan` trains, input to head.

    All groups exist from step 0, so that optimizer and scheduler never change shape. Parameters with the same learning
    rate in every stage and the same weight decay share a group. Parameters that do not require gradients are left out
    (the base model under an adapter).

    Args:
        model: the model.
        groups: its layer groups.
        plan: the plan.
        weight_decay: weight decay of parameters with two or more dimensions that are not in `no_decay`.
        no_decay: names of parameters without weight decay.

    Returns:
        Dictionaries with `params`, `weight_decay`, `lr` (learning rate in the first stage that trains them), `layers`
        (names of their layer groups) and `rates` (learning rate in each stage, 0.0 where frozen).
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
    """Whether the parameter has two or more dimensions; a vector shaped for broadcasting, (1, 1, 1, C), has one."""
    return parameter.ndim == 2 or sum(size > 1 for size in parameter.shape) > 1


def lr_factors(
    plan: Callable[[], Plan], group: dict[str, Any], schedule: Callable[[int], float]
) -> Callable[[int], float]:
    """The factor on an optimizer group's `lr` at each step: the stage's learning rate and warmup, times the schedule.

    The learning rate at step t is rate * schedule(t) * min(1, (t - t_unfreeze) / unfreeze_warmup_steps). `plan` is
    called at each step, because with plateaus the start of a stage becomes known only during training. The factor is a
    closure, because `LambdaLR` would save and restore the attributes of a callable object.

    Args:
        plan: returns the current plan.
        group: optimizer group from `parameter_groups`.
        schedule: the run's learning-rate schedule, from optimizer step to factor.
    """
    base, rates = group["lr"], group["rates"]

    def factor(step: int) -> float:
        return schedule(step) * (plan().rate(step, rates) / base)

    return factor


def current_rates(param_groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Current learning rate of each layer group, input to head; 0.0 if it is frozen.

    Parts of a layer group with different learning rates are listed separately, with a number after the name.
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
