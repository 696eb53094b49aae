"""What `evaluate` says beyond the metrics: classes, calibration, subgroups, robustness, data from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.special import logit

from hf_transfer.config.arguments.examining import Examining
from hf_transfer.data.labels import LABELS, REGRESSION
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError
from hf_transfer.evaluation.by_class import with_intervals
from hf_transfer.evaluation.diagnostics import calibration_of
from hf_transfer.evaluation.subgroups import check_column, groups_of, measure_groups
from hf_transfer.evaluation.thresholds import thresholds_of
from hf_transfer.inference.held_out import HeldOut
from hf_transfer.inference.outsiders import Outsiders, read_outside, sample, separations
from hf_transfer.inference.robustness import check_robustness, measure_robustness
from hf_transfer.inference.selecting import Selecting


class Outside(NamedTuple):
    """Data from elsewhere.

    Attributes:
        name: as it was given.
        split: that was read.
        examples: of it.
        inputs: names of the input columns.
        notes: messages for the user.
    """

    name: str | None
    split: str
    examples: Dataset
    inputs: tuple[str, ...]
    notes: list[str]


class Asked(NamedTuple):
    """What `evaluate` is asked beyond the metrics.

    Attributes:
        groups: by column, the positions of the examples of each value.
        robustness: whether examples are to be corrupted.
        outside: of `ood_data`.
    """

    groups: dict[str, dict[Any, Any]]
    robustness: bool
    outside: Outside | None


class Examined(Selecting):
    """A model that is looked at more closely; see `Predictor`."""

    def _asked(self, examining: Examining, examples: Dataset, most: int | None) -> Asked:
        """What is to be measured, checked before the model answers anything.

        Raises:
            UserError: a column of `by` makes no groups; the task has no corruptions; `ood_data` cannot be read.
        """
        if examining.robustness:
            check_robustness(self.task)
        groups = {name: _groups(examples, name) for name in examining.columns}
        outside = None if examining.ood_data is None else self._outside(examining.ood_data, most)
        return Asked(groups, examining.robustness, outside)

    def _examine(self, asked: Asked, held_out: HeldOut, logits: Any, labels: Any, results: dict[str, Any]) -> None:
        """Add what was asked for to the results of `evaluate`."""
        kind, limits = self.labels.problem_type, self._limits
        results["per_class"] = with_intervals(kind, self.labels.names, logits, labels, limits)
        results["calibration"] = calibration_of(kind, logits, labels)
        if asked.groups:
            results["subgroups"] = {
                name: list(measure_groups(kind, logits, labels, rows, limits)) for name, rows in asked.groups.items()
            }
        if asked.robustness:
            results["robustness"] = self._robustness(held_out, labels, results["metrics"])
        if asked.outside is not None:
            results["ood"] = self._separated(held_out, asked.outside, results["notes"])

    @property
    def _limits(self) -> Any:
        """The logit above which each label of a multi-label model is predicted; 0 for any other."""
        thresholds = thresholds_of(self.model.config)
        return logit(np.array(thresholds)) if thresholds else 0.0

    def _robustness(self, held_out: HeldOut, labels: Any, clean: Mapping[str, float]) -> dict[str, Any]:
        return measure_robustness(
            self.task,
            self.processor,
            lambda: self._parts(held_out.examples, held_out.inputs),
            lambda values: self.logits(values)[0],
            self.labels.problem_type,
            labels,
            clean,
            self._limits,
            self.seed,
        )

    def ood_scores(self, inputs: Any) -> Any:
        """How unlike the training examples inputs are, as a pandas frame; higher is less alike.

        The columns are `energy` (not for regression) and, where the run's training examples can be read again,
        `neighbors` and `mahalanobis`: see `evaluation.out_of_distribution`. Training examples are read at each call.

        Args:
            inputs: as of `predict`.

        Raises:
            UserError: as of `predict`; or the model predicts a number, and its training examples are not known.
            WorkFailed: a logit or feature is NaN or infinite.
        """
        import pandas

        read = [e.values for e in self._checked(inputs) if e.values]
        outsiders = Outsiders.of(self, self._training)
        if outsiders.reference is None and self.labels.problem_type == REGRESSION:
            raise UserError(f"ood_scores: a model that predicts a number has no energy. {outsiders.reason}")
        parts = (read[i : i + self.batch_size] for i in range(0, len(read), self.batch_size))
        return pandas.DataFrame(outsiders.scores(parts))

    def _training(self) -> tuple[Dataset, Callable[[Dataset], Iterator[list[tuple[Any, ...]]]]]:
        """(examples that the run trained on, how to read them in batches).

        Raises:
            UserError: they are not known, or gone.
        """
        held_out = self._held_out(None, "train")
        return sample(held_out.examples, self), lambda examples: self._parts(examples, held_out.inputs)

    def _outside(self, given: Any, most: int | None) -> Outside:
        """The examples of `ood_data`, at most `most`."""
        model, args = self._on(given, {})
        assert args is not None, "data was given"
        return Outside(args.dataset_name, *read_outside(model, args, most))

    def _separated(self, held_out: HeldOut, outside: Outside, notes: list[str]) -> dict[str, Any]:
        """`ood` of the results.

        Raises:
            UserError: no example from elsewhere can be read; or no score is defined.
        """
        outsiders = Outsiders.of(self, self._training)
        if outsiders.reference is None and self.labels.problem_type == REGRESSION:
            raise UserError(f"a model that predicts a number has no energy. {outsiders.reason}", key="ood_data")
        others = outsiders.scores(self._parts(outside.examples, outside.inputs, skips=True))
        read = len(next(iter(others.values()), ()))
        if not read:
            raise UserError(f"none of the {len(outside.examples):,} examples can be read.", key="ood_data")
        notes += [*outside.notes, *outsiders.notes]
        if unusable := len(outside.examples) - read:
            notes.append(f"ood_data: {unusable:,} unusable examples are left out.")
        inside = outsiders.scores(self._parts(held_out.examples, held_out.inputs))
        return {
            "data": outside.name,
            "split": outside.split,
            "num_inside": len(held_out.examples),
            "num_outside": read,
            "num_training": outsiders.compared,
            "scores": separations(inside, others, self.seed),
        }


def _groups(examples: Dataset, name: str) -> dict[Any, Any]:
    """The examples of each value of a column, a class by its name.

    Raises:
        UserError: there is no such column, or it does not make groups.
    """
    check_column(name, [column for column in examples.column_names if column not in (ROW, LABELS)])
    feature, values = examples.features[name], examples.select_columns([name]).with_format(None)[name][:]
    if isinstance(feature, ClassLabel):
        values = [None if value is None else feature.int2str(value) for value in values]
    return groups_of(name, values)
