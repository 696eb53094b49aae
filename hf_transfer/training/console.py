"""What a Trainer prints of its logs: the learning rates of backbone and head instead of one per layer group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from hf_transfer.files import say
from hf_transfer.layers.architectures import HEAD
from hf_transfer.plan.plan import Plan
from hf_transfer.training import schedule_checks
from hf_transfer.training.running import RunningTrainer

RATE = "learning_rate/"


def is_silent(args: TrainingArguments) -> bool:
    """Whether nothing but errors is printed: `log_level: error` or `critical`."""
    return args.log_level in ("error", "critical")


def rates_in_words(logs: Mapping[str, Any]) -> str:
    """The learning rates of a log: of the backbone, from the lowest to the highest that trains, and of the head."""
    rates = {name.removeprefix(RATE): rate for name, rate in logs.items() if name.startswith(RATE)}
    if not rates:
        return f"{logs['learning_rate']:.2e}"
    head = rates.pop(HEAD, None)
    trained = [rate for rate in rates.values() if rate]
    if not trained and not head:  # the first step of a warmup
        return "0"
    low, high = min(trained, default=head), max(trained, default=head)
    if low == high == head and trained:
        return f"{head:.2e}"
    backbone = f"{low:.2e}" if low == high else f"{low:.2e} to {high:.2e}"
    return ", ".join([*([backbone] if trained else []), *([f"head {head:.2e}"] if head else [])])


def shortened(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A log for the console: `learning_rate` in words, nothing per layer group."""
    logs = dict(logs or {})
    if any(name.startswith(RATE) for name in logs):
        logs["learning_rate"] = rates_in_words(logs)
    return {name: value for name, value in logs.items() if not name.startswith(RATE)}


class ShortBars(ProgressCallback):
    """transformers' progress bars, with shorter log lines."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, shortened(logs), **kwargs)


class ShortLines(PrinterCallback):
    """transformers' log lines, shorter."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, shortened(logs), **kwargs)


def show_plan(trainer: RunningTrainer, plan: Plan) -> None:
    """Print the plan at the beginning of training, and again if a smaller batch changes it."""
    is_wanted = trainer.shows_plan and not is_silent(trainer.args) and trainer.is_world_process_zero()
    if is_wanted and plan != trainer.shown_plan:
        say(str(plan))
        for note in schedule_checks.notes(trainer.args, plan, trainer.num_steps) if plan.num_train_epochs else ():
            say(note)
    trainer.shown_plan = plan


def replace_default(handler: CallbackHandler, args: TrainingArguments) -> None:
    """Replace Trainer's own bars and lines by shorter ones, or by none; subclasses of the caller's stay."""
    shorter: dict[type, Any] = {ProgressCallback: ShortBars, PrinterCallback: ShortLines}
    kept = []
    for callback in handler.callbacks:
        if type(callback) not in shorter:
            kept.append(callback)
        elif not is_silent(args):
            kept.append(shorter[type(callback)]())
    handler.callbacks = kept
