"""The examples that a trained model is measured on: what its run held out, or other data, without what it was trained
on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, Image

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.columns import Columns, as_shown
from hf_transfer.data.draws import Array
from hf_transfer.data.examine import examine, without_bad
from hf_transfer.data.label_columns import find_labels
from hf_transfer.data.labels import Labels, missing_labels
from hf_transfer.data.load import load_held_out, load_splits
from hf_transfer.data.raw import RawSplits
from hf_transfer.data.record import Change, Record, SplitRecord, content_of, positions
from hf_transfer.data.split_names import standard_name
from hf_transfer.data.splits import Data, encode_split, make_data, name_of
from hf_transfer.data.streaming import beginning
from hf_transfer.errors import UserError, listed, nearest, option
from hf_transfer.run_folder import RESULTS, held_out_by_each, read_results, refitted
from hf_transfer.tasks.base import Task

_HELD_OUT = ("test", "validation")
_CHEAP_TEXTS, _CHEAP_IMAGES = 100_000, 2_000  # examples of splits that are compared though they are not measured on
_MAX_SHOWN = 3


class HeldOut(NamedTuple):
    """What to measure on.

    Attributes:
        name: of the split.
        examples: with encoded labels.
        inputs: names of the input columns.
        notes: messages for the user: what changed since the run, what was left out.
        left_out: number of examples left out by reason: `trained_on`, `unusable`.
    """

    name: str
    examples: Dataset
    inputs: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: Mapping[str, int]


@dataclass
class Selection:
    """Selects the examples to measure a model on.

    Attributes:
        task: what the model reads.
        labels: what it predicts.
        args: where the data is, and how it is read.
        seed: of the run's splits.
        record: the examples of the run; None if they are not known.
        is_run: whether the model comes from a run that names its data.
        notes: messages for the user so far.
        left_out: number of examples left out so far, by reason.
        folder: of the run; None if it has none.
    """

    task: Task
    labels: Labels
    args: DataArguments
    seed: int
    record: Record | None
    is_run: bool
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    folder: Path | None = None

    def of_run(self, split: str | None) -> HeldOut:
        """A split of the run's own data; by default what the run reported on.

        Raises:
            UserError: the data names nothing, there is no such split, or nothing of it is left.
        """
        if not (self.args.dataset_name or self.args.train_file):
            raise UserError(
                "test_file or dataset_name is missing: what to evaluate on.", "The run does not say what it held out."
            )
        splits = (beginning if self.args.streaming else load_splits)(self.args)
        splits, inputs = self._with_inputs(splits, "train")
        found = find_labels(splits, inputs, self.args, self.labels)
        make = partial(
            make_data, found.splits, inputs, found.name, labels=self.labels, args=self.args, seed=self.seed
        )  # as the run did
        data = self._usable(make())
        name = standard_name(split) if split else "test" if data.test is not None else "validation"
        if name not in data.splits:
            _refuse_split(split, name, splits, data)
        if self.record is not None and self.record.inputs == data.inputs:
            data = self._as_recorded(data, name, make)
        if name == "validation" and split is None:
            self._refuse_refitted(len(data.validation))
        asks = ("train", "validation") if self.record is not None and self.record.refitted else ("train",)
        return self._without_trained(name, data.splits[name], inputs, is_asked_for=name in asks)

    def of_other_data(self, split: str | None, finds_columns: bool = False) -> HeldOut:
        """A split of other data: the given one, else test, else validation, else the only one.

        Args:
            split: its name.
            finds_columns: whether columns that the run names and the data lacks are found as for any data, with a note.

        Raises:
            UserError: there is no such data or split, it is unlabeled, its labels are not the model's, or all of it was
                trained on.
        """
        name, splits = load_held_out(self.args, split)
        absent = self._absent_columns(splits[name]) if finds_columns else []
        splits, inputs = self._with_inputs(splits, name)
        self._check_labeled(name, splits[name])
        found = find_labels(splits, inputs, self.args, self.labels)
        if absent:
            self.notes.append(f"It has no {' and no '.join(absent)}; {' and '.join((*inputs, found.name))} was read.")
        examples, skipped = encode_split(found.splits[name], name, found.name, self.labels, self.args)
        skipped = [*(bad for bad in found.splits.bad if bad.split == name), *skipped]
        if self.args.on_bad_example == "skip" or self.args.data_facts:
            examples, bad = without_bad(examples, name, inputs, self.task.trace, self.args, skipped)
            if bad:
                self.left_out["unusable"] = len(bad)
                shown = listed((f"{b.example}: {b.reason}" for b in bad), _MAX_SHOWN)
                self.notes.append(f"{len(bad):,} unusable examples are left out ({shown}).")
        is_asked_for = split is not None and name == "train"
        return self._without_trained(name, examples, inputs, is_asked_for)

    def unlabeled(self) -> tuple[str, Dataset, tuple[str, ...]]:
        """(name of the split, its examples, their input columns) of other data, whose labels are not read.

        Columns that the run names and the data lacks are found as for any data, with a note.

        Raises:
            UserError: there is no such data, or it has no inputs for the model.
        """
        name, splits = load_held_out(self.args, None, is_labeled=False)
        key = self.task.input_key
        named = getattr(self.args, key) if key else None
        wanted = [named] if isinstance(named, str) else list(named or ())
        if wanted and not all(column in splits[name].features for column in wanted):
            unnamed: dict[str, Any] = {key: None}
            self.args = replace(self.args, **unnamed)
            images = [c for c, feature in splits[name].features.items() if isinstance(feature, Image)]
            if images and not self.task.suffixes:
                raise UserError(f"it holds images (column {images[0]!r}), and the model reads text.")
            splits, inputs = self._with_inputs(splits, name)
            self.notes.append(f"It has no {' and '.join(wanted)}; {' and '.join(inputs)} was read instead.")
        else:
            splits, inputs = self._with_inputs(splits, name)
        return name, splits[name], inputs

    def _absent_columns(self, examples: Dataset) -> list[str]:
        """Columns that the run names and the examples lack; they are not looked for any more."""
        absent = list[str]()
        for key in filter(None, (self.task.input_key, "label_column_name")):
            named = getattr(self.args, key)
            wanted = [named] if isinstance(named, str) else list(named or ())
            if lacking := [column for column in wanted if column not in examples.features]:
                unnamed: dict[str, Any] = {key: None}
                self.args, absent = replace(self.args, **unnamed), [*absent, *lacking]
        return absent

    def _with_inputs(self, splits: RawSplits, name: str) -> tuple[RawSplits, tuple[str, ...]]:
        """(the splits with inputs of the right type, the input columns), as the split `name` shows them."""
        columns = Columns(splits[name], splits.written, self.args.text_column_name)
        inputs = self.task.input_columns(columns, self.args)
        if not inputs:
            raise UserError(
                f"{self.task.input_key}: the data has no input column for {self.task.name}.",
                f"Name one of {', '.join(columns)}.",
            )
        return as_shown(splits, columns, inputs, self.args.on_bad_example == "skip"), inputs

    def _check_labeled(self, name: str, examples: Dataset) -> None:
        """Raises:
        UserError: the examples have no labels.
        """
        column = self.args.label_column_name
        columns = [column] if isinstance(column, str) else list(column or [])
        missing = [c for c in columns if c not in examples.features]
        if (columns and len(missing) == len(columns)) or (
            len(columns) == 1 and len(missing_labels(examples, columns[0])) == len(examples)
        ):
            lacks = f"it has no column {missing[0]!r}" if missing else f"column {columns[0]!r} is empty"
            raise UserError(
                f"The {name} split ({len(examples):,} examples) is unlabeled: {lacks}.",
                "`hf-transfer predict` answers inputs without labels. If the labels are in another column, name it "
                f"with label_column_name: {', '.join(examples.features)}.",
            )

    def _usable(self, data: Data) -> Data:
        """`data` without bad and leaked examples, as the run left them out."""
        if self.args.on_bad_example != "skip" and not self.args.drop_leaks:
            return data
        train = ("train",) if self._is_cheap(data.train, data.inputs) else ()
        return examine(data, self.task.trace, self.args, self.seed, (*_HELD_OUT, *train))[0]

    def _is_cheap(self, split: Dataset, inputs: Sequence[str]) -> bool:
        has_images = any(isinstance(split.features[c], Image) for c in inputs)
        return len(split) <= (_CHEAP_IMAGES if has_images else _CHEAP_TEXTS)

    def _as_recorded(self, data: Data, name: str, make: Any) -> Data:
        """The splits of the run. Where it drew the validation split itself and the data has changed since, its members
        are recognized by content: another draw would hold out examples that were trained on."""
        assert self.record is not None
        changes = self._changes(data, name)
        drawn = [c for c in changes if data.drawn_from and c.split in ("train", "validation")]
        if any(drawn) and self.record.is_limited_alike("validation", self.args):
            wanted = self.record.splits["validation"].content
            data = make(choose=lambda train: positions(content_of(train, data.inputs), wanted))
            if not len(data.validation):
                raise UserError(
                    f"None of the {len(wanted):,} examples that the run held out for validation is left in the data.",
                    "Measure on other data with test_file or dataset_name.",
                )
            data = self._usable(data)
            changes = self._changes(data, name)
        if any(changes):
            told = "; ".join(f"{c}{self._of_a_sample(c.split)}" for c in changes if c)
            self.notes.append(f"The data has changed since the run ({told}).")
        return data

    def _changes(self, data: Data, name: str) -> list[Change]:
        """How the splits differ from the recorded ones: the one that is measured on, and others that are small."""
        assert self.record is not None
        record = self.record
        compared = [n for n in data.splits if n in record.splits and record.is_limited_alike(n, self.args)]
        return [
            record.change(n, SplitRecord.of(data.splits[n], data.inputs, self.labels))
            for n in compared
            if n == name or (record.limits[n] is None and self._is_cheap(data.splits[n], data.inputs))
        ]

    def _of_a_sample(self, name: str) -> str:
        assert self.record is not None
        return " in a new sample" if self.record.limits[name] is not None and name != "validation" else ""

    def _without_trained(self, name: str, examples: Dataset, inputs: tuple[str, ...], is_asked_for: bool) -> HeldOut:
        """The examples without those that were trained on, unless the training split is asked for.

        Raises:
            UserError: none is left.
        """
        record, total = self.record, len(examples)
        if record is None or not record.has_train or record.inputs != inputs:
            self._note_unknown()
        else:
            content = content_of(examples, inputs)
            is_trained = np.isin(content, record.trained)
            known_leaks = int(np.isin(content, record.train).sum() - is_trained.sum())
            if is_asked_for:
                seen = int(np.isin(content, record.train).sum())
                self.notes.append(
                    f"{seen:,} of these {total:,} examples were trained on: the metrics do not say how the model does "
                    "on new data."
                )
            elif is_trained.any():
                examples = self._leave_out(name, examples, inputs, is_trained)
            if not is_asked_for and known_leaks:
                self.notes.append(
                    f"{known_leaks:,} examples that the run held out also occur in its training data; drop_leaks: true "
                    "keeps them from being trained on."
                )
        return HeldOut(name, examples, inputs, tuple(self.notes), self.left_out)

    def _leave_out(self, name: str, examples: Dataset, inputs: tuple[str, ...], is_trained: Array) -> Dataset:
        """Raises:
        UserError: nothing else is left.
        """
        count, total = int(is_trained.sum()), len(examples)
        shown = listed(name_of(examples, inputs, int(i)) for i in np.flatnonzero(is_trained)[:_MAX_SHOWN])
        more = f" and {count - _MAX_SHOWN:,} more" if count > _MAX_SHOWN else ""
        if count == total:
            raise UserError(
                f"All {total:,} examples of the {name} split were trained on ({shown}{more}).",
                f"Measure on other data; {option('split', 'train')} measures on training examples and says so.",
            )
        self.left_out["trained_on"] = count
        self.notes.append(f"{count:,} of {total:,} examples were trained on and are left out: {shown}{more}.")
        return examples.select(np.flatnonzero(~is_trained))

    def _refuse_refitted(self, count: int) -> None:
        """Raises:
        UserError: the run fitted again on what it had held out, so that nothing is held out any more.
        """
        if self.record is not None and self.record.refitted:
            raise UserError(
                f"The run holds out no example any more: after it was measured on the {count:,} validation examples, "
                "it was fitted again on those too (refit: true).",
                f"{_measured_before(self.folder)}Measure on other data (test_file, dataset_name). "
                f"{option('split', 'validation')} measures on them all the same and says so; validation_metrics in "
                "results.json are of the first fit.",
            )

    def _note_unknown(self) -> None:
        if not self.is_run:
            return
        record = self.record
        if record is None:
            reason = "the run's folder has no record of them"
        elif not record.has_train:
            reason = "the training set was a stream, and the run has not finished"
        else:
            reason = f"the run read {' and '.join(record.inputs)}"
        self.notes.append(f"Examples that were trained on are not recognized: {reason}.")


def _measured_before(folder: Path | None) -> str:
    """What several trainings of a finished run came to on what each held out, as a sentence and a space."""
    if folder is None or not (folder / RESULTS).is_file():
        return ""
    said = held_out_by_each(refitted(read_results(folder)[0]) or {})
    return f"{said} " if said else ""


def _refuse_split(split: str | None, name: str, splits: DatasetDict, data: Data) -> None:
    """Raises:
    UserError: always; the data has no such split, or it has no labels.
    """
    if name in splits:
        raise UserError(f"split: the {name} split has no labels.", "`hf-transfer predict` answers its inputs.")
    raise UserError(
        f"split: the data has no split {split!r}.",
        f"It has {', '.join(data.splits)}.{nearest(str(split), data.splits)}",
    )
