"""Early stopping that a resumed run goes on with."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which counts on where a checkpoint's run had counted to.

    Trainer writes the count into `trainer_state.json` and reads it back only with
    `restore_callback_states_from_checkpoint`, which replaces all callbacks by new ones.
    """

    @property
    def has_ended(self) -> bool:
        """Whether the patience is used up."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continue counting, and end at once a run that had ended."""
        states = state.stateful_callbacks
        assert isinstance(states, dict), "TrainerState makes it one"
        before = states.get(type(self).__name__) if state.global_step else None  # else of this callback's last run
        counted = before["attributes"]["early_stopping_patience_counter"] if isinstance(before, dict) else 0
        self.early_stopping_patience_counter = counted
        states[type(self).__name__] = self.state()  # Trainer fails to save where the checkpoint's run had no callback
        control.should_training_stop |= self.has_ended

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Count an evaluation, if it is one of the set that decides."""
        name = str(args.metric_for_best_model)
        if f"eval_{name.removeprefix('eval_')}" in (metrics or {}):
            super().on_evaluate(args, state, control, metrics, **kwargs)


def ended_by(callbacks: list[Any]) -> EarlyStopping | None:
    """The callback that has ended the training, if one has."""
    return next((c for c in callbacks if isinstance(c, EarlyStopping) and c.has_ended), None)
