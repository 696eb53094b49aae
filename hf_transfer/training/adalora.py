"""AdaLoRA's rank allocation (Zhang et al. 2023), called after each optimizer step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_transfer.errors import UserError

# ---- AdaLoRA -------------------------------------------------------------------------------------------------------


class AdaLora(TrainerCallback):
    """Gives AdaLoRA the number of steps, and its budget after each one (Zhang et al. 2023, section 3.3)."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step:
            raise UserError(
                "resume_from_checkpoint: adalora's budget is in no checkpoint, so its run cannot be continued.",
                "Start anew, or use adapter: lora.",
            )
        config = model.active_peft_config
        config.total_step = state.max_steps
        if not config.tinit and not config.tfinal:
            config.tinit, config.tfinal = state.max_steps // 10, state.max_steps // 3
        model.base_model.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Cut away the ranks that the budget masked, as the files do, so that both compute the same sums."""
        pattern = model.active_peft_config.rank_pattern
        if pattern:
            model.base_model.resize_modules_by_rank_pattern(pattern, model.active_adapter)
