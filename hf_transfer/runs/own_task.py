"""The task that a run's checkpoint was trained for: its data, and the checkpoint's own head on any backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from hf_transfer.adapters.files import merged
from hf_transfer.data.bundled import DATASETS
from hf_transfer.data.labels import LABELS, REGRESSION
from hf_transfer.errors import UserError, named
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.metric_table import LEADING, LOSS
from hf_transfer.evaluation.thresholds import logits_of
from hf_transfer.inference.predictor import Predictor
from hf_transfer.layers.groups import layer_groups
from hf_transfer.objectives.losses import Loss
from hf_transfer.training.run_subject import sampled
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


class OwnTask:
    """The checkpoint's own task.

    Attributes:
        dataset: name of its data.
        split: name of the split that is evaluated on.
        metric: that is reported.
        digest: of the examples, to recognize them by.
        notes: messages for the user.

    Args:
        checkpoint: hub id, folder or bundled name.
        dataset: name of labeled data. Columns that the checkpoint's run names and the data lacks are found as for any
            data.
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
            data = predictor.other_data(dataset_name=dataset)
            held_out = predictor._held_out(data, None, most, finds_columns=True)
        except UserError as error:
            raise self._refused(checkpoint, error) from error
        self.split, self.labels = held_out.name, np.array(held_out.examples[LABELS][:])
        self.digest = f"{len(held_out.examples)} {sampled(held_out.examples)}"
        self._prepared = predictor.task.prepare(held_out.examples, held_out.inputs, predictor.processor, data)
        self.metric = LEADING[predictor.labels.problem_type][0]
        said = f"Watched: {len(self):,} examples of {dataset} ({self.split}), with the head of {checkpoint}."
        self.notes = (said, *(f"Watched: {note}" for note in held_out.notes))

    def _refused(self, checkpoint: str, error: UserError) -> UserError:
        """The error about the data, with what the user of this key can do about it."""
        problem, keys = error.problem, (self.predictor.task.input_key, "label_column_name", "problem_type")
        for key in filter(None, keys):  # of the checkpoint's run, which this one does not have
            problem = problem.removeprefix(f"{key}: ")
        problem = problem if self.dataset in problem else f"{self.dataset!r}: {problem}"
        is_unknown = self.dataset.startswith("bundled:") and self.dataset not in DATASETS
        if error.key == "dataset_name" or is_unknown:  # there is no such data
            return UserError(problem, error.fix, key=_KEY)
        labels = self.predictor.labels
        own = "numbers" if labels.problem_type == REGRESSION else f"labels {named(labels.names, 4)}"
        return UserError(
            problem,
            f"Use labeled examples of the task that {checkpoint!r} was trained for ({own}), other than its training "
            "examples.",
            key=_KEY,
        )

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
