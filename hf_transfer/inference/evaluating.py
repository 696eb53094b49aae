"""From labeled data to metrics, as training computes them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.examining import Examining
from hf_transfer.data.labels import LABELS
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.measure import held_out_metrics, measured, metrics_of
from hf_transfer.evaluation.thresholds import thresholds_of
from hf_transfer.inference.examined import Examined
from hf_transfer.inference.held_out import HeldOut
from hf_transfer.objectives.losses import Loss


@dataclass
class Evaluating(Examined):
    """A model that is measured on labeled data; see `Predictor`."""

    def evaluate(
        self, data: Any = None, split: str | None = None, max_examples: int | None = None, **keys: Any
    ) -> dict[str, Any]:
        """Metrics on labelled data, as training computes them.

        Args:
            data: hub id, file, folder or `bundled:<name>`, or the data itself, as of `fine_tune`; None takes what the
                run held out.
            split: which of its splits (default: test, else validation, else the only one).
            max_examples: only so many of them, drawn by class.
            **keys: other data keys, for example `test_file` or `label_column_name`; `tta`, `stride` and `pool` as in
                `Views`; `by` and others as in `Examining`.

        Returns:
            `{"metrics", "intervals", "per_class", "calibration", "metrics_split", "num_examples", "dataset", "notes",
            "left_out"}`; `notes` are messages for the user, and `left_out` counts examples by the reason why they were
            not measured on: `trained_on`, `unusable`. For float and 32-bit images also `clipped_images`: how many have
            values beyond the range of the training data. With `by` also `subgroups`: for each of its columns, the
            entries of `evaluation.subgroups.measure_groups`. With `robustness` also that: see
            `inference.robustness.measure_robustness`. With `ood_data` also `ood`: `data`, `split`, numbers of examples
            `num_inside`, `num_outside` and `num_training`, and `scores`: by name, the
            `evaluation.out_of_distribution.separation` of each.

        Raises:
            UserError: there is no such data or key, its labels are missing or not the model's, or nothing is left that
                was not trained on.
        """
        return self._evaluated(data, split, max_examples, keys)[0]

    def _evaluated(
        self, given: Any, split: str | None, max_examples: int | None, keys: Mapping[str, Any]
    ) -> tuple[dict[str, Any], HeldOut, Any, Any]:
        """(what `evaluate` returns, the examples, their (examples, outputs) logits, their encoded labels)."""
        examining = Examining.of(keys)
        model, data = self._on(given, {k: v for k, v in keys.items() if k not in vars(examining)})
        held_out = model._held_out(data, split, max_examples)
        _, examples, inputs, notes, left_out = held_out
        asked = model._asked(examining, examples, max_examples)
        clipped = model.task.clipped(examples, inputs, model.processor)
        if model.views.several:
            results, logits, labels = model._measure_looks(examples, inputs)
        else:
            prepared = model.task.prepare(examples, inputs, model.processor, data or model.data)
            results, logits, labels = model._measured(prepared)
        about = {"metrics_split": held_out.name, "dataset": _name_of(data or model.data)}
        results = {**results, **clipped, **about, "notes": list(notes), "left_out": dict(left_out)}
        model._examine(asked, held_out, logits, labels, results)
        return results, held_out, logits, labels

    def inputs_of(
        self, data: Any = None, split: str | None = None, max_examples: int | None = None, **keys: Any
    ) -> tuple[str, list[tuple[Any, ...]]]:
        """(name of the split, inputs as `logits` takes them) of the examples that `evaluate` measures on.

        Args:
            data: as of `evaluate`, like the others.
            split: likewise.
            max_examples: likewise.
            **keys: likewise.

        Raises:
            UserError: as of `evaluate`.
        """
        model, args = self._on(data, keys)
        held_out = model._held_out(args, split, max_examples)
        return held_out.name, [v for part in model._parts(held_out.examples, held_out.inputs) for v in part]

    def spread_of(self, data: Any = None, split: str | None = None) -> float:
        """The standard deviation of the labels that `evaluate` measures a regression on.

        Args:
            data: as of `evaluate`.
            split: likewise.
        """
        model, args = self._on(data, {})
        return float(np.std(model._held_out(args, split).examples[LABELS][:]))

    def _answered(
        self, data: Any, split: str | None, max_examples: int | None, keys: Mapping[str, Any]
    ) -> tuple[HeldOut, Any, Any]:
        """(the examples of what `evaluate` is given, their (examples, outputs) logits, their encoded labels)."""
        model, args = self._on(data, keys)
        held_out = model._held_out(args, split, max_examples)
        return held_out, model._logits_of(held_out.examples, held_out.inputs), np.array(held_out.examples[LABELS][:])

    def _measure_looks(self, examples: Dataset, inputs: tuple[str, ...]) -> tuple[dict[str, Any], Any, Any]:
        """As `_measured`, of logits that are pooled over the looks at each example; the loss is theirs too."""
        kind, pooled = self.labels.problem_type, self._logits_of(examples, inputs)
        labels = np.array(examples[LABELS][:])
        loss = Loss(kind).total(torch.tensor(pooled), torch.tensor(labels)) / len(labels)
        values = {"loss": float(loss), **metrics.compute(kind, pooled, labels)}
        return _about(measured(kind, values, pooled, labels, thresholds_of(self.model.config))), pooled, labels

    def measure(self, prepared: Dataset) -> dict[str, Any]:
        """Metrics and intervals on prepared examples, by Trainer's own evaluation loop."""
        return self._measured(prepared)[0]

    def _measured(self, prepared: Dataset) -> tuple[dict[str, Any], Any, Any]:
        """(what `measure` returns, (examples, outputs) logits, encoded labels)."""
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                per_device_eval_batch_size=self.batch_size,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.accelerator.is_available(),
                disable_tqdm=True,
                average_tokens_across_devices=False,  # else Trainer multiplies BERT's loss by the number of processes
                use_cpu=not torch.accelerator.is_available(),
                **({self.precision: True} if self.precision else {}),
            )
            trainer = Trainer(
                model=self.model,
                args=args,
                data_collator=self.task.collator(self.processor),
                compute_metrics=lambda p: metrics_of(self.labels.problem_type, p),
            )
            results = held_out_metrics(trainer, prepared, self.labels.problem_type)
        return _about(results), results["logits"], results["labels"]


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("metrics", "intervals", "num_examples")}


def _name_of(data: DataArguments) -> str | None:
    return data.test_file or data.dataset_name or data.train_file
