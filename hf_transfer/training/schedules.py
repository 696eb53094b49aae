"""Learning-rate schedules that transformers lacks, as a factor on every learning rate at each optimizer step.

`one_cycle`: Smith and Topin 2018, in the form of `torch.optim.lr_scheduler.OneCycleLR` (momentum is not cycled).
`cosine_warm_restarts`: SGDR, Loshchilov and Hutter 2017, equation 5, as `CosineAnnealingWarmRestarts`. `T_0` counts
optimizer steps; transformers' own `cosine_with_restarts` divides the run into `num_cycles` equal parts instead.
`slanted_triangular`: ULMFiT, Howard and Ruder 2018, equation 3.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from hf_transfer.errors import UserError, nearest

Schedule = Callable[[int], float]


def one_cycle(
    total: int,
    learning_rate: float,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal_strategy: str = "cos",
    three_phase: bool = False,
) -> Schedule:
    """From 1/div_factor up to 1 in the first `pct_start` of the steps, then down to 1/(div_factor·final_div_factor).

    With `three_phase` the way down mirrors the way up, and a last phase falls to the final value.
    """
    _require("pct_start", pct_start, 0 < pct_start < (0.5 if three_phase else 1), "a fraction of the steps")
    _require("div_factor", div_factor, div_factor >= 1, "1 or more")
    _require("final_div_factor", final_div_factor, final_div_factor >= 1, "1 or more")
    _require("anneal_strategy", anneal_strategy, anneal_strategy in ("cos", "linear"), "cos or linear")
    low, end = 1 / div_factor, 1 / (div_factor * final_div_factor)
    up = pct_start * total - 1
    phases = [(up, low, 1.0), (total - 1, 1.0, end)]
    if three_phase:
        phases = [(up, low, 1.0), (2 * up, 1.0, low), (total - 1, low, end)]

    def factor(step: int) -> float:
        begin = 0.0
        for last, first_value, last_value in phases:
            if step <= last:
                done = (step - begin) / (last - begin) if last > begin else 1.0
                share = (1 - math.cos(math.pi * done)) / 2 if anneal_strategy == "cos" else done
                return first_value + (last_value - first_value) * share
            begin = last
        return end

    return factor


def cosine_warm_restarts(
    total: int, learning_rate: float, *, T_0: int, T_mult: int = 1, eta_min: float = 0.0
) -> Schedule:
    """Half cosines of `T_0`, `T_0`·`T_mult`, … optimizer steps, each from 1 down to `eta_min` / learning_rate."""
    _require("T_0", T_0, isinstance(T_0, int) and T_0 >= 1, "a whole number of optimizer steps, 1 or more")
    _require("T_mult", T_mult, isinstance(T_mult, int) and T_mult >= 1, "a whole number, 1 or more")
    _require("eta_min", eta_min, 0 <= eta_min <= learning_rate, "a learning rate from 0 to learning_rate")
    low = eta_min / learning_rate

    def factor(step: int) -> float:
        length = T_0
        while T_mult > 1 and step >= length:
            step, length = step - length, length * T_mult
        return low + (1 - low) * (1 + math.cos(math.pi * (step % length) / length)) / 2

    return factor


def slanted_triangular(total: int, learning_rate: float, *, cut_frac: float = 0.1, ratio: float = 32.0) -> Schedule:
    """From 1/ratio up to 1 in the first `cut_frac` of the steps, then down to 1/ratio, both linearly."""
    _require("cut_frac", cut_frac, 0 < cut_frac < 1, "a fraction of the steps")
    _require("ratio", ratio, ratio >= 1, "1 or more")
    cut = max(1, math.floor(total * cut_frac))

    def factor(step: int) -> float:
        p = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / cut_frac - 1))
        return (1 + max(p, 0.0) * (ratio - 1)) / ratio

    return factor


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "one_cycle": one_cycle,
    "cosine_warm_restarts": cosine_warm_restarts,
    "slanted_triangular": slanted_triangular,
}
# These start with a warmup of their own.
_RISING = {"one_cycle": "pct_start", "slanted_triangular": "cut_frac"}


def name_of(args: TrainingArguments) -> str:
    """The name of a run's schedule, as the user writes it."""
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


def run_schedule(args: TrainingArguments, total: int) -> Schedule | None:
    """The factor on every learning rate at each of `total` optimizer steps; None for a schedule that follows a metric.

    Raises:
        UserError: `lr_scheduler_kwargs` does not fit the schedule.
    """
    warmup = args.get_warmup_steps(total)
    if args.lr_scheduler_type in SCHEDULES:
        kwargs = args.lr_scheduler_kwargs or {}
        return make_schedule(args.lr_scheduler_type, kwargs, total, warmup, args.learning_rate)
    # transformers' own, taken from a dummy optimizer; some read its learning rate.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return scheduler.lr_lambdas[0] if isinstance(scheduler, LambdaLR) else None


def make_schedule(
    name: str, kwargs: Mapping[str, Any], total: int, warmup_steps: int, learning_rate: float
) -> Schedule:
    """The factor at each optimizer step of a run of `total` steps.

    Args:
        name: one of `SCHEDULES`.
        kwargs: `lr_scheduler_kwargs`.
        total: optimizer steps of the run.
        warmup_steps: steps of a linear rise from 0 before `cosine_warm_restarts` begins.
        learning_rate: that `eta_min` is relative to.

    Raises:
        UserError: an unknown key, a value out of range, or a missing key.
    """
    function = SCHEDULES[name]
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key in kwargs:
        if key not in parameters:
            raise UserError(
                f"lr_scheduler_kwargs: {name} has no {key!r}, it has {', '.join(parameters)}.{nearest(key, parameters)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in kwargs:
            raise UserError(
                f"lr_scheduler_kwargs: {name} needs {key}.", f"For example {{{key}: {max(1, total // 4)}}}."
            )
    if warmup_steps and name in _RISING:
        raise UserError(
            f"warmup_steps: {name} has a warmup of its own.",
            f"Set {_RISING[name]} in lr_scheduler_kwargs instead.",
        )
    schedule = function(total - warmup_steps, learning_rate, **kwargs)

    def factor(step: int) -> float:
        return step / warmup_steps if step < warmup_steps else schedule(step - warmup_steps)

    return factor


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"lr_scheduler_kwargs: {name}: {value!r} is not {expected}.")
