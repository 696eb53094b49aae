"""The models whose weights are averaged: runs, or checkpoints of one, and whether their weights belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.adapters.files import merged
from hf_transfer.config.values import load_yaml
from hf_transfer.data.record import Record, content_of
from hf_transfer.errors import UserError, named
from hf_transfer.evaluation.metric_table import LEADING, LOSS, METRIC_TABLE, names
from hf_transfer.inference.held_out import HeldOut
from hf_transfer.inference.predictor import Predictor
from hf_transfer.layers.identity import OF_A_TASK
from hf_transfer.models.averaging import State, recompute_statistics
from hf_transfer.run_folder import EXAMPLES, RESULTS, RUN_FILE
from hf_transfer.settings import keys
from hf_transfer.training import checkpoints
from hf_transfer.training.checkpoint_contents import WEIGHTS_ONLY

_STATISTICS_EXAMPLES = 2048  # training examples that BatchNorm's statistics are computed from
_SAME_KEYS = ("max_seq_length", "image_size", "pooling", "pooling_layer")


@dataclass(frozen=True)
class Candidate:
    """A model on the disk.

    Attributes:
        folder: that it is loaded from: a run or one of its checkpoints.
        run: folder of its run.
    """

    folder: Path
    run: Path

    @property
    def name(self) -> str:
        return self.folder.as_posix()

    def load(self, **changes: Any) -> Predictor:
        """The model, an adapter merged into its backbone.

        The mean of the merged weights is the backbone plus the mean of the updates. The mean of the factors of an
        update (LoRA's A and B) would not be: the mean of products is not the product of the means.

        Raises:
            UserError: it cannot be loaded, or has an adapter that cannot be merged.
        """
        predictor = Predictor.load(self.folder, **changes)
        return replace(predictor, model=merged(predictor.model).eval())

    def results(self) -> dict[str, Any]:
        """What the run's `results.json` holds; empty if it has none."""
        path = self.run / RESULTS
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def candidates_of(words: Sequence[str]) -> list[Candidate]:
    """What RUN… names: several runs or checkpoints, or of one run all checkpoints.

    Raises:
        UserError: one is no run, was named twice, or one run has fewer than two checkpoints.
    """
    found = [candidate_of(word) for word in words]
    for i, one in enumerate(found):
        if any(one.folder.samefile(other.folder) for other in found[:i]):
            raise UserError(f"RUN: {one.name!r} is named twice.", "Name each once.")
    if len(found) > 1 or found[0].folder != found[0].run:
        return found
    run = found[0].run
    saved = [f for f in reversed(checkpoints.checkpoints(run)) if checkpoints.problem(f) in (None, WEIGHTS_ONLY)]
    if len(saved) < 2:
        raise UserError(
            f"RUN: {run.as_posix()!r} has {len(saved) or 'no'} checkpoint{'' if len(saved) == 1 else 's'}, and an "
            "average needs two.",
            "Name several runs; or train with save_total_limit: 10, which keeps ten checkpoints.",
        )
    return [Candidate(folder, run) for folder in saved]


def candidate_of(word: str) -> Candidate:
    """The run or checkpoint in a folder.

    Raises:
        UserError: it is neither.
    """
    folder = Path(word)
    for run in (folder, folder.parent):
        if folder.is_dir() and (run / RUN_FILE).is_file():
            return Candidate(folder, run)
    what = "has no run.yaml" if folder.is_dir() else "is no folder"
    raise UserError(
        f"RUN: {word!r} {what}; the validation split that weights are judged on stands there.",
        "Name the output folder of a run, or a checkpoint in one.",
    )


def differences(candidates: Sequence[Candidate]) -> tuple[list[str], list[dict[str, Any]]]:
    """(the adapter of each, `none` without; the keys of each that are not the same in all of their runs).

    Only keys that model cards show are compared.
    """
    values = [load_yaml((one.run / RUN_FILE).read_text(encoding="utf-8")) for one in candidates]
    names = [name for name, key in keys().items() if key.about.card != "never"]
    varied = [name for name in names if any(own.get(name) != values[0].get(name) for own in values)]
    adapters = [str(one.results().get("adapter", "none")) for one in candidates]
    return adapters, [{name: own.get(name) for name in varied} for own in values]


class Judge:
    """Measures weights on the validation split of a run.

    Attributes:
        predictor: a model of the architecture, which holds the weights that were measured last.
        metric: that decides.
        greater: whether greater is better.

    Args:
        first: whose run's validation split counts.
        metric: name of a metric; None for the one that a run of this problem type is judged by.
        **changes: as of `Predictor.load`.

    Raises:
        UserError: the run names no data, or there is no such metric.
    """

    def __init__(self, first: Candidate, metric: str | None, **changes: Any):
        predictor = Predictor.load(first.run, **changes)
        self.predictor = replace(predictor, model=merged(predictor.model).eval())
        labels = predictor.labels
        available = (LOSS, *names(labels.problem_type, len(labels.names)))
        self.metric = metric or LEADING[labels.problem_type][0]
        if self.metric not in available:
            raise UserError(f"{metric!r} is not one of {', '.join(available)}.", key="metric")
        self.greater = METRIC_TABLE[self.metric].greater_is_better
        self.held_out = predictor._held_out(None, "validation")
        self.prepared = self._prepared(self.held_out.examples, self.held_out.inputs)

    def _prepared(self, examples: Any, inputs: tuple[str, ...]) -> Any:
        predictor = self.predictor
        return predictor.task.prepare(examples, inputs, predictor.processor, predictor.data)

    def put(self, state: State, statistics: Sequence[str] = ()) -> None:
        """Let the model have these weights; BatchNorm's statistics of the named layers are computed anew."""
        self.predictor.model.load_state_dict(state)
        if statistics:
            recompute_statistics(self.predictor.model, statistics, self._training_batches())

    def _training_batches(self) -> Any:
        predictor = self.predictor
        train = predictor._held_out(None, "train", _STATISTICS_EXAMPLES)
        examples, collate = self._prepared(train.examples, train.inputs), predictor.task.collator(predictor.processor)
        for start in range(0, len(examples), predictor.batch_size):
            rows = [examples[i] for i in range(start, min(start + predictor.batch_size, len(examples)))]
            yield {name: value for name, value in collate(rows).items() if name != "labels"}

    def measure(self, state: State, statistics: Sequence[str] = ()) -> dict[str, float]:
        """Metrics of these weights on the validation split."""
        self.put(state, statistics)
        return dict(self.predictor.measure(self.prepared)["metrics"])

    def better(self, one: float, other: float, or_equal: bool = False) -> bool:
        """Whether `one` is better than `other`; NaN never is."""
        return (one > other if self.greater else one < other) or (or_equal and one == other)

    # ---- do they belong together? ----

    def check(self, candidates: Sequence[Candidate], split: str | None = None, **changes: Any) -> None:
        """Check that the weights belong together.

        Args:
            candidates: the first is that of the judge.
            split: that is measured at the end, as of `soup`.
            **changes: as of `Predictor.load`.

        Raises:
            UserError: architectures, labels or backbones differ, or one was trained on what the weights are judged or
                measured on.
        """
        first, backbones = candidates[0], dict[str, Candidate]()
        for one in candidates:
            self._compare(first, one, one.load(**changes))
            digest = (one.results().get("backbone") or {}).get("weights")
            if digest is not None:
                backbones.setdefault(digest, one)
        if len(backbones) > 1:
            a, b = list(backbones.values())[:2]
            raise UserError(
                f"RUN: {a.name!r} and {b.name!r} were fine-tuned from different backbones, whose average is no model.",
                "Average runs that start from the same pretrained weights.",
            )
        for run in {one.run for one in candidates}:
            self._check_held_out(run, self.held_out, "judged")
        if others := {one.run for one in candidates} - {first.run}:
            measured = self.predictor._held_out(None, split)
            for run in others:
                self._check_held_out(run, measured, "measured")

    def _compare(self, first: Candidate, one: Candidate, loaded: Predictor) -> None:
        own, labels = self.predictor, loaded.labels
        both = f"RUN: {first.name!r} and {one.name!r}"
        if labels != own.labels:
            raise UserError(
                f"{both} predict different labels: {named(own.labels.names)} and {named(labels.names)}.",
                "Average runs with the same labels in the same order.",
            )
        shapes = [{n: t.shape for n, t in p.model.state_dict().items()} for p in (own, loaded)]
        configs = [{k: v for k, v in p.model.config.to_dict().items() if k not in OF_A_TASK} for p in (own, loaded)]
        other = sorted(k for k in configs[0].keys() | configs[1].keys() if configs[0].get(k) != configs[1].get(k))
        if type(own.model).__name__ != type(loaded.model).__name__ or shapes[0] != shapes[1] or other:
            told = f" ({', '.join(other[:3])} differ)" if other else ""
            raise UserError(
                f"{both} have different architectures{told}.", "Average runs of the same model, head included."
            )
        if one.run == one.folder:
            keys = [k for k in _SAME_KEYS if vars(own.data).get(k) != vars(loaded.data).get(k)]
            if keys:
                raise UserError(f"{both} read inputs differently ({', '.join(keys)} differ).", "Train them alike.")

    def _check_held_out(self, run: Path, held_out: HeldOut, what: str) -> None:
        record = Record.load(run / EXAMPLES)
        if record is None or not record.has_train or record.inputs != held_out.inputs:
            return
        seen = int(np.isin(content_of(held_out.examples, held_out.inputs), record.trained).sum())
        if seen:
            split = held_out.name
            raise UserError(
                f"RUN: {run.as_posix()!r} trained on {seen:,} of the {len(held_out.examples):,} {split} examples that "
                f"the average is {what} on.",
                "Train the runs with refit: false."
                if record.refitted
                else f"Train all runs with the same {split} split: the same data_seed, or {split}_file.",
            )
