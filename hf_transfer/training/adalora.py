"""AdaLoRA's rank allocation (Zhang et al. 2023), so that it can be resumed, rolled back and gone on from.

While ranks are allocated, every module has its first rank, and ranks beyond the budget are masked: their singular
values are set to zero, after each step in which the budget is applied. At the end they are removed. A run that goes on
from a saved adapter keeps the ranks that it found.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from hf_transfer.adapters.configuration import peft_type
from hf_transfer.errors import UserError

_LEAST_STEPS = 3  # a third of the run trains with the final ranks
_SMOOTHED = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the allocator's importance scores, by parameter


def is_adalora(model: Any) -> bool:
    """Whether the model's adapter is AdaLoRA."""
    return isinstance(model, PeftModel) and peft_type(model) == "ADALORA"


def allocates(model: Any) -> bool:
    """Whether ranks are still to be allocated: not in an adapter that was saved with its ranks."""
    return is_adalora(model) and not model.active_peft_config.rank_pattern


def check_schedule(model: Any, steps: int) -> None:
    """Check that the run has room for AdaLoRA's three phases.

    Args:
        model: with its adapter.
        steps: optimizer steps of the run.

    Raises:
        UserError: it has not.
    """
    if not allocates(model):
        return
    config = model.active_peft_config
    if steps < _LEAST_STEPS:
        raise UserError(
            f"adapter: adalora needs at least {_LEAST_STEPS} steps to allocate ranks, and the run has {steps}.",
            "Train longer, or use lora.",
        )
    if config.init_r <= config.target_r:
        raise UserError(
            f"adapter: init_r: {config.init_r} leaves nothing to allocate with target_r: {config.target_r}.",
            "Raise init_r, or use lora.",
        )
    if config.tinit + config.tfinal >= steps:
        raise UserError(
            f"adapter: tinit: {config.tinit} and tfinal: {config.tfinal} leave none of {steps} steps for allocation.",
            "Lower them, or leave them out: a tenth and a third of the run.",
        )


class AdaLora(TrainerCallback):
    """Tell AdaLoRA the number of steps, and update its rank budget after each (Zhang et al. 2023, section 3.3).

    Args:
        model: before training.
    """

    def __init__(self, model: PeftModel):
        self._allocates = allocates(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self._allocates:
            return
        config = model.active_peft_config
        config.total_step = state.max_steps
        if not config.tinit and not config.tfinal:
            config.tinit, config.tfinal = state.max_steps // 10, state.max_steps // 3
        model.base_model.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._allocates:
            model.base_model.update_and_allocate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Remove the masked ranks, as saving does, so that the model and the saved files compute the same."""
        if not self._allocates:
            return
        keep_what_acts(model)
        if pattern := model.active_peft_config.rank_pattern:
            model.base_model.resize_modules_by_rank_pattern(pattern, model.active_adapter)
            self._allocates = False


@torch.no_grad()
def keep_what_acts(model: Any) -> None:
    """Put every rank whose singular value is not zero into the rank pattern that is saved.

    Between two allocations a masked rank trains again; peft would save the model without it.
    """
    if not is_adalora(model) or not model.active_peft_config.rank_pattern:
        return
    config, adapter = model.active_peft_config, model.active_adapter
    values = {_key(name, adapter): p for name, p in _values(model)}
    for name, kept in config.rank_pattern.items():
        value = values[_key(name, adapter)]
        if len(kept) == len(value):  # else it is that of the saved adapter
            acting = (value != 0).flatten().tolist()
            config.rank_pattern[name] = [bool(one or other) for one, other in zip(kept, acting, strict=True)]


def _values(model: Any) -> list[tuple[str, nn.Parameter]]:
    """(name, singular values) of each adapted module."""
    return [(n, p) for n, p in model.base_model.model.named_parameters() if f"lora_E.{model.active_adapter}" in n]


def _key(name: str, adapter: str) -> str:
    """A name in the rank pattern; peft leaves out the adapter's name there once it has saved."""
    return name.removesuffix(f".{adapter}")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def state_of(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(importance scores, rank pattern) of the allocation; empty for other adapters."""
    if not is_adalora(model):
        return {}, {}
    allocator = model.base_model.rankallocator
    scores = {f"{kind}/{n}": t for kind in _SMOOTHED for n, t in getattr(allocator, kind).items()}
    return scores, dict(model.active_peft_config.rank_pattern or {})


def restore(model: Any, scores: dict[str, torch.Tensor], pattern: dict[str, Any]) -> None:
    """Set what `state_of` returned; scores go to the device of their parameter."""
    if not is_adalora(model):
        return
    allocator = model.base_model.rankallocator
    devices = {name: p.device for name, p in model.base_model.model.named_parameters()}
    allocator.reset_ipt()
    for name, score in scores.items():
        kind, _, parameter = name.partition("/")
        getattr(allocator, kind)[parameter] = score.to(devices[parameter])
    model.active_peft_config.rank_pattern = pattern or None
