"""What a model forgets: the task that its checkpoint was trained for, with the checkpoint's own head.

The old head stays as it was and is put on the backbone as it is now. How far its metric falls is what the backbone has
lost for the old task; a head that is trained again on it may recover part of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.adapters.files import merged
from hf_transfer.evaluation.metric_table import LOSS
from hf_transfer.files import write_bytes
from hf_transfer.report.curve_plot import draw
from hf_transfer.run_folder import FORGETTING_PNG
from hf_transfer.runs.own_task import OwnTask, put_backbone
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.progress import FORGETTING
from hf_transfer.training.trainer import TransferTrainer

__all__ = ["Watching", "put_backbone", "watch"]


@dataclass
class Watching(TrainerCallback):
    """Measures the old task before training and at each evaluation, and logs it as `forgetting_…`."""

    task: OwnTask
    trainer: TransferTrainer
    before: float | None = None  # of a resumed run that was not watched until now

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self._note()
        elif not any(f"{FORGETTING}{LOSS}" in log and log["step"] == 0 for log in state.log_history):
            self.before = self.task.measure(self.task.predictor.model.state_dict(), self.trainer)[self.task.metric]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.is_in_train:
            self._note()

    def _note(self) -> None:
        measured = self.measure()
        names = dict.fromkeys((self.task.metric, LOSS))
        self.trainer.log({f"{FORGETTING}{name}": measured[name] for name in names})

    def measure(self) -> dict[str, float]:
        """Metrics of the old task with the model as it is."""
        return self.task.measure(merged(self.trainer.model).state_dict(), self.trainer)

    def finish(self, folder: Path) -> dict[str, Any]:
        """What `results.json` says; called by all processes, draws the picture."""
        task, name = self.task, f"{FORGETTING}{self.task.metric}"
        logs = {log["step"]: log[name] for log in self.trainer.state.log_history if name in log}
        if self.before is not None:
            logs = {0: self.before, **logs}
        curve = [{"step": step, task.metric: value} for step, value in logs.items()]
        after = self.measure()
        if self.trainer.is_world_process_zero():
            series = {f"{task.dataset}, {task.split}": list(logs.values())}
            write_bytes(
                folder / FORGETTING_PNG, draw(list(logs), series, "optimizer step", f"{task.metric} of the old task")
            )
        return {
            "dataset": task.dataset,
            "split": task.split,
            "num_examples": len(task),
            "metric": task.metric,
            "before": next(iter(logs.values()), None),
            "after": after[task.metric],
            "metrics": after,
            "curve": curve,
        }


def watch(prepared: Prepared, trainer: TransferTrainer) -> Watching | None:
    """Watch the checkpoint's own task while a run trains; None without `forgetting_dataset_name`."""
    task = prepared.earlier.watched
    if task is None:
        return None
    task.predictor.model.to(trainer.args.device)
    watching = Watching(task, trainer)
    trainer.add_callback(watching)
    return watching
