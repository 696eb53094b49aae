"""What a model forgets: the task that its checkpoint was trained for, with the checkpoint's own head.

The old head stays as it was and is put on the backbone as it is now. How far its metric falls is what the backbone has
lost for the old task; a head that is trained again on it may recover part of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.adapters.files import merged
from hf_transfer.data.labels import LABELS
from hf_transfer.errors import UserError
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.metric_table import LEADING, LOSS
from hf_transfer.evaluation.thresholds import logits_of
from hf_transfer.files import write_bytes
from hf_transfer.inference.predictor import Predictor
from hf_transfer.layers.groups import layer_groups
from hf_transfer.objectives.losses import Loss
from hf_transfer.report.curve_plot import draw
from hf_transfer.run_folder import FORGETTING_PNG
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.progress import FORGETTING
from hf_transfer.training.trainer import TransferTrainer

_KEY = "forgetting_dataset_name"


def backbone_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights and buffers of a model without an adapter that its head reads from, by name; not copied."""
    head = {name.rpartition(".")[0] for name in layer_groups(model)[-1].parameters}
    return {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in head}


@torch.no_grad()
def put_backbone(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Put a model's head on another backbone, in place.

    Args:
        model: without an adapter; keeps its head.
        state: of a model without an adapter and of the same backbone, whatever its head.
    """
    for name, tensor in backbone_of(model).items():
        tensor.copy_(state[name])


class OldTask:
    """The checkpoint's own task.

    Attributes:
        dataset: name of its data.
        split: name of the split that is evaluated on.
        metric: that is reported.

    Args:
        checkpoint: hub id, folder or bundled name.
        dataset: name of labeled data.
        most: examples at most; None for all.
        **changes: as of `Predictor.load`.

    Raises:
        UserError: the checkpoint has no head, or the data or its labels are not those of that head.
    """

    def __init__(self, checkpoint: str, dataset: str, most: int | None = None, **changes: Any):
        self.dataset = dataset
        try:
            loaded = Predictor.load(checkpoint, **changes)
        except UserError as error:
            if error.key == "RUN" or error.problem.startswith("RUN:"):
                raise UserError(
                    f"{checkpoint!r} has no head of its own that could forget: {error.problem.removeprefix('RUN: ')}",
                    f"Remove {_KEY}, or start from a model that was fine-tuned for a task.",
                    key=_KEY,
                ) from error
            raise
        predictor = self.predictor = replace(loaded, model=merged(loaded.model).eval())
        try:
            held_out = predictor._held_out(predictor.other_data(dataset_name=dataset), None, most)
        except UserError as error:
            raise UserError(f"{dataset!r}: {error.problem}", error.fix, key=_KEY) from error
        self.split, self.labels = held_out.name, np.array(held_out.examples[LABELS][:])
        self._prepared = predictor.task.prepare(
            held_out.examples, held_out.inputs, predictor.processor, replace(predictor.data, dataset_name=dataset)
        )
        self.metric = LEADING[predictor.labels.problem_type][0]

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, model: Any) -> None:
        """Raises:
        UserError: the model lacks layers that the old head reads, or has an adapter that cannot be merged.
        """
        try:
            state = merged(model).state_dict()
        except UserError as error:
            raise UserError(
                f"the old head cannot be put on this adapter: {error.problem}", f"Remove {_KEY}.", key=_KEY
            ) from error
        own = backbone_of(self.predictor.model)
        unlike = [n for n, t in own.items() if n not in state or state[n].shape != t.shape]
        if unlike:
            raise UserError(
                f"the checkpoint's head reads layers that the run's model does not have as they were ({unlike[0]}).",
                "Leave pooling, pooling_layer and image_size as the checkpoint has them.",
                key=_KEY,
            )

    @torch.no_grad()
    def measure(self, state: Mapping[str, torch.Tensor], trainer: TransferTrainer | None = None) -> dict[str, float]:
        """Metrics of the old head on a backbone; called by all processes of a trainer, each of which takes a share.

        Args:
            state: of a model without an adapter, whatever its head.
            trainer: in whose precision and processes it is evaluated.
        """
        predictor, model = self.predictor, self.predictor.model
        put_backbone(model, state)
        collate, size = predictor.task.collator(predictor.processor), predictor.batch_size
        rank, ranks = (0, 1) if trainer is None else (trainer.args.process_index, trainer.args.world_size)
        parts: list[tuple[int, Any]] = []
        for start in range(rank * size, len(self), ranks * size):
            batch = collate([self._prepared[i] for i in range(start, min(start + size, len(self)))])
            inputs = {n: v.to(model.device) for n, v in batch.items() if n != LABELS}
            if trainer is None:
                logits = model(**inputs).logits
            else:
                with trainer.accelerator.autocast():
                    logits = model(**inputs).logits
            parts.append((start, logits.float().cpu().numpy()))
        parts = gather_object(parts) if ranks > 1 else parts
        logits = logits_of(np.concatenate([part for _, part in sorted(parts, key=lambda one: one[0])]))
        kind = predictor.labels.problem_type
        loss = float(Loss(kind).total(torch.tensor(logits), torch.tensor(self.labels))) / len(self)
        return {LOSS: loss, **metrics.compute(kind, logits, self.labels)}


@dataclass
class Watching(TrainerCallback):
    """Measures the old task before training and at each evaluation, and logs it as `forgetting_…`."""

    task: OldTask
    trainer: TransferTrainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self._note()

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
    """Watch the old task of a run while it trains; None without `forgetting_dataset_name`.

    Raises:
        UserError: see `OldTask`.
    """
    values = prepared.config.values
    if values[_KEY] is None:
        return None
    task = OldTask(
        str(values["model_name_or_path"]),
        values[_KEY],
        values["max_forgetting_samples"],
        trust_remote_code=prepared.config.model.trust_remote_code,
        allow_pickle=prepared.config.model.allow_pickle,
        model_revision=prepared.config.model.model_revision,
        per_device_eval_batch_size=trainer.args.per_device_eval_batch_size,
    )
    task.predictor.model.to(trainer.args.device)
    task.check(trainer.model)
    watching = Watching(task, trainer)
    trainer.add_callback(watching)
    return watching
