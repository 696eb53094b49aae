"""From labeled data to metrics, as training computes them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.draws import draw
from hf_transfer.data.images import undecoded
from hf_transfer.data.in_memory import splits_of
from hf_transfer.data.labels import LABELS
from hf_transfer.data.locate import IN_MEMORY
from hf_transfer.data.record import Record
from hf_transfer.errors import UserError, nearest
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.measure import held_out_metrics, measured, metrics_of
from hf_transfer.evaluation.thresholds import thresholds_of
from hf_transfer.inference.answering import Answering
from hf_transfer.inference.held_out import HeldOut, Selection
from hf_transfer.inference.inputs import example
from hf_transfer.objectives.losses import Loss


@dataclass
class Evaluating(Answering):
    """A model that is measured on labeled data; see `Predictor`.

    Attributes:
        record: the examples that its run trained on and held out, by content; None if they are not known.
    """

    record: Record | None = field(default=None, repr=False)

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
                `Views`.

        Returns:
            `{"metrics", "intervals", "metrics_split", "num_examples", "dataset", "notes", "left_out"}`; `notes` are
            messages for the user, and `left_out` counts examples by the reason why they were not measured on:
            `trained_on`, `unusable`. For float and 32-bit images also `clipped_images`: how many have values beyond the
            range of the training data.

        Raises:
            UserError: there is no such data or key, its labels are missing or not the model's, or nothing is left that
                was not trained on.
        """
        return self._evaluated(data, split, max_examples, keys)[0]

    def _evaluated(
        self, given: Any, split: str | None, max_examples: int | None, keys: Mapping[str, Any]
    ) -> tuple[dict[str, Any], HeldOut, Any, Any]:
        """(what `evaluate` returns, the examples, their (examples, outputs) logits, their encoded labels)."""
        model, data = self._on(given, keys)
        held_out = model._held_out(data, split, max_examples)
        _, examples, inputs, notes, left_out = held_out
        clipped = model.task.clipped(examples, inputs, model.processor)
        if model.views.several:
            results, logits, labels = model._measure_looks(examples, inputs)
        else:
            prepared = model.task.prepare(examples, inputs, model.processor, data or model.data)
            results, logits, labels = model._measured(prepared)
        about = {"metrics_split": held_out.name, "dataset": _name_of(data or model.data)}
        results = {**results, **clipped, **about, "notes": list(notes), "left_out": dict(left_out)}
        return results, held_out, logits, labels

    def other_data(self, **keys: Any) -> DataArguments:
        """The run's data keys for other data: columns as in the run, unless named otherwise; nothing of its files."""
        nothing = dict.fromkeys(
            ("in_memory", "dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
        )
        return replace(self.data, **{**nothing, "max_predict_samples": None, "streaming": False, **keys})

    def _on(self, given: Any, keys: Mapping[str, Any]) -> tuple[Evaluating, DataArguments | None]:
        """(the model that looks and reads as the keys say, where the data is; None for the run's own).

        Args:
            given: hub id, path or `bundled:<name>`, data as of `fine_tune`, `DataArguments`, or None.
            keys: data keys and those of `Views`.

        Raises:
            UserError: there is no such key, or it is no data.
        """
        views = {f.name: keys[f.name] for f in fields(Views) if f.name in keys}
        model = replace(self, views=Views.of(views)) if views else self
        keys, names = {k: v for k, v in keys.items() if k not in views}, [f.name for f in fields(DataArguments)]
        for name in keys:
            if name not in names:
                raise UserError(f"{name} is no key of data.{nearest(name, names)}")
        if isinstance(given, DataArguments):
            return model, replace(given, **keys)
        if given is None and not (keys.get("test_file") or keys.get("dataset_name")):
            return replace(model, data=replace(model.data, **keys)), None
        if given is None or isinstance(given, str | os.PathLike):
            named = {} if given is None else {"dataset_name": os.fspath(given)}
            return model, model.other_data(**{**keys, **named})
        args = model.other_data(**keys)
        return model, replace(args, dataset_name=IN_MEMORY, in_memory=splits_of(given, args, name="test"))

    def _held_out(
        self, data: DataArguments | None = None, split: str | None = None, max_examples: int | None = None
    ) -> HeldOut:
        """The examples to measure on, with encoded labels."""
        is_run = bool(self.data.dataset_name or self.data.train_file)
        selection = Selection(self.task, self.labels, data or self.data, self.seed, self.record, is_run)
        chosen = selection.of_run(split) if data is None else selection.of_other_data(split)
        if max_examples is not None and max_examples < len(chosen.examples):
            sample = draw(chosen.examples, max_examples, self.labels, self.seed).sample
            return chosen._replace(examples=sample)
        return chosen

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

    def _logits_of(self, examples: Dataset, inputs: tuple[str, ...]) -> Any:
        """(examples, outputs) logits, pooled over the looks at each example.

        Raises:
            UserError: an example is unusable.
        """
        return np.concatenate([self.logits(part)[0] for part in self._parts(examples, inputs)])

    def _parts(self, examples: Dataset, inputs: tuple[str, ...]) -> Iterator[list[tuple[Any, ...]]]:
        """Examples as `logits` takes them, batch by batch.

        Raises:
            UserError: an example is unusable.
        """
        count = 0
        for batch in undecoded(examples, inputs).iter(batch_size=self.batch_size):
            read = [example(self.task, None, row) for row in zip(*(batch[c] for c in inputs), strict=True)]
            for i, item in enumerate(read):
                if item.values is None:
                    raise UserError(f"Example {count + i} of the data cannot be used: {item.error}.")
            count += len(read)
            yield [item.values for item in read if item.values is not None]

    def _measure_looks(self, examples: Dataset, inputs: tuple[str, ...]) -> tuple[dict[str, Any], Any, Any]:
        """As `_measured`, of logits that are pooled over the looks at each example; the loss is theirs too."""
        kind, pooled = self.labels.problem_type, self._logits_of(examples, inputs)
        labels = np.array(examples[LABELS][:])
        loss = Loss(kind).total(torch.tensor(pooled), torch.tensor(labels)) / len(labels)
        values = {"loss": float(loss), **metrics.compute(kind, pooled, labels)}
        return measured(kind, values, pooled, labels, thresholds_of(self.model.config)), pooled, labels

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
        about = {name: results[name] for name in ("metrics", "intervals", "num_examples")}
        return about, results["logits"], results["labels"]


def _name_of(data: DataArguments) -> str | None:
    return data.test_file or data.dataset_name or data.train_file
