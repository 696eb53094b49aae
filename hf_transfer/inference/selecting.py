"""A trained model and labeled data for it: which, which of its examples, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from datasets import Dataset

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.draws import draw
from hf_transfer.data.images import undecoded
from hf_transfer.data.in_memory import splits_of
from hf_transfer.data.labels import LABELS
from hf_transfer.data.locate import IN_MEMORY
from hf_transfer.data.record import Record
from hf_transfer.errors import UserError, nearest
from hf_transfer.inference.answering import Answering
from hf_transfer.inference.held_out import HeldOut, Selection
from hf_transfer.inference.inputs import example


@dataclass
class Selecting(Answering):
    """A model that reads labeled data; see `Predictor`.

    Attributes:
        record: the examples that its run trained on and held out, by content; None if they are not known.
        folder: of its run; None of a model from a hub.
    """

    record: Record | None = field(default=None, repr=False)
    folder: Path | None = field(default=None, repr=False)

    def other_data(self, **keys: Any) -> DataArguments:
        """The run's data keys for other data: columns as in the run, unless named otherwise; nothing of its files."""
        nothing = dict.fromkeys(
            ("in_memory", "dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
        )
        return replace(self.data, **{**nothing, "max_predict_samples": None, "streaming": False, **keys})

    def _on(self, given: Any, keys: Mapping[str, Any]) -> tuple[Self, DataArguments | None]:
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
        self,
        data: DataArguments | None = None,
        split: str | None = None,
        max_examples: int | None = None,
        finds_columns: bool = False,
    ) -> HeldOut:
        """The examples to measure on, with encoded labels; see `Selection`."""
        is_run = bool(self.data.dataset_name or self.data.train_file)
        args = data or self.data
        selection = Selection(self.task, self.labels, args, self.seed, self.record, is_run, folder=self.folder)
        chosen = selection.of_run(split) if data is None else selection.of_other_data(split, finds_columns)
        if max_examples is not None and max_examples < len(chosen.examples):
            sample = draw(chosen.examples, max_examples, self.labels, self.seed).sample
            return chosen._replace(examples=sample)
        return chosen

    def samples(self, split: str, count: int) -> list[tuple[tuple[Any, ...], str]]:
        """(raw input columns, the label in words) of examples of the run's own data, drawn by class.

        Args:
            split: its name.
            count: how many at most. An image is its path or its file's bytes, as `data.images` takes them.

        Raises:
            UserError: the data is not known or gone, or has no such split.
        """
        held_out = self._held_out(None, split, count)
        raw = undecoded(held_out.examples, held_out.inputs)
        columns = [raw[column][:] for column in held_out.inputs]
        labels = (self.labels.in_words(label) for label in held_out.examples[LABELS][:])
        return list(zip(zip(*columns, strict=True), labels, strict=True))

    def _logits_of(self, examples: Dataset, inputs: tuple[str, ...]) -> Any:
        """(examples, outputs) logits, pooled over the looks at each example.

        Raises:
            UserError: an example is unusable.
        """
        return np.concatenate([self.window_logits(part)[0] for part in self._parts(examples, inputs)])

    def _parts(
        self, examples: Dataset, inputs: tuple[str, ...], skips: bool = False
    ) -> Iterator[list[tuple[Any, ...]]]:
        """Examples as `window_logits` takes them, window by window; without unusable ones if it skips them.

        Raises:
            UserError: an example is unusable, and is not skipped.
        """
        count = 0
        for batch in undecoded(examples, inputs).iter(batch_size=self._window):
            read = [example(self.task, None, row) for row in zip(*(batch[c] for c in inputs), strict=True)]
            for i, item in enumerate(read):
                if item.values is None and not skips:
                    raise UserError(f"Example {count + i} of the data cannot be used: {item.error}.")
            count += len(read)
            yield [item.values for item in read if item.values is not None]
