"""AdaLoRA's rank allocation (Zhang et al. 2023)."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_transfer.errors import UserError


class AdaLora(TrainerCallback):
    """Tell AdaLoRA the number of steps, and update its rank budget after each (Zhang et al. 2023, section 3.3)."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step:
            raise UserError(
                "resume_from_checkpoint: checkpoints do not hold adalora's rank budget, so its run cannot be resumed.",
                "Start over, or use adapter: lora.",
            )
        config = model.active_peft_config
        config.total_step = state.max_steps
        if not config.tinit and not config.tfinal:
            config.tinit, config.tfinal = state.max_steps // 10, state.max_steps // 3
        model.base_model.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Remove the masked ranks, as saving does, so that the model and the saved files compute the same."""
        pattern = model.active_peft_config.rank_pattern
        if pattern:
            model.base_model.resize_modules_by_rank_pattern(pattern, model.active_adapter)
