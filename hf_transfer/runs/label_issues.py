"""Labels that look wrong in a run's data: `label_issues.csv`, written before anything is trained.

After training, a model agrees with the wrong labels that it was trained on. The pretrained weights know none of them,
and each label is judged by a head that was solved for without it (`analysis.label_issues`).
"""

from __future__ import annotations

import csv
import io
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from hf_transfer.analysis.label_issues import LabelIssue, judge_features
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, REGRESSION
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError
from hf_transfer.features import FeatureStore, FrozenFeatures
from hf_transfer.features.layouts import MEAN
from hf_transfer.files import say, write_bytes
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.run_folder import LABEL_ISSUES
from hf_transfer.runs.decisions import recorded
from hf_transfer.runs.frozen_pass import frozen_pass
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer

MOST = 5_000  # examples, of which a pass through the model is short beside training
MOST_VALUES = 1_000_000  # examples times classes: one core solves for the heads in about 100 s
_COLUMNS = ("place", "verdict", "given", "suggested", "probability", "score")
WRONG, DOUBTFUL = "wrong", "doubtful"
_BETWEEN = "; "  # names of several labels


@dataclass(frozen=True)
class QuestionableLabel:
    """An example whose label looks wrong, or is doubtful.

    Attributes:
        place: file and line of the example, or its row in the split.
        verdict: `wrong`, or `doubtful`.
        given: names of its labels, separated by semicolons.
        suggested: likewise, those that it seems to have.
        probability: of the given label, by heads that were solved for without it.
        score: 0 to 1, the lower the likelier the label is wrong.
        inputs: the example: texts, or the path of an image, if it has one.
    """

    place: str
    verdict: str
    given: str
    suggested: str
    probability: float
    score: float
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class LabelIssues:
    """Labels that look wrong.

    Attributes:
        issues: the examples whose label looks wrong, the likeliest first, and then those whose label is doubtful.
        judged: number of examples whose label was judged.
        left_out: number of other examples: no second example has their class.
        classes_left_out: number of classes that were not judged: fewer than two examples have them, or lack them.
        agreement: fraction of the labels that held-out predictions agree with.
        layers: groups whose features they are made from: the mean of the output, or the input of the head.
        l2: strength of the heads' penalty, for each of the layers.
        seconds: that judging took, without the features.
    """

    issues: tuple[QuestionableLabel, ...]
    judged: int
    left_out: int
    classes_left_out: int
    agreement: float
    layers: tuple[str, ...]
    l2: tuple[float, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`, without the examples."""
        about = {n: list(v) if isinstance(v, tuple) else v for n, v in vars(self).items() if n != "issues"}
        return _counts([issue.verdict for issue in self.issues]) | about

    def save(self, path: Path) -> None:
        """Write a CSV file with one row per example, also if there are none."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        names = list(self.issues[0].inputs) if self.issues else []
        writer.writerow([*_COLUMNS, *(f"input {name}" if name in _COLUMNS else name for name in names)])
        for issue in self.issues:
            values = (getattr(issue, name) for name in _COLUMNS)
            cells = (f"{value:.4f}" if isinstance(value, float) else value for value in values)
            writer.writerow([*cells, *issue.inputs.values()])
        write_bytes(path, file.getvalue().encode("utf-8", "backslashreplace"))


# ---- in a run --------------------------------------------------------------------------------------------------------


def write_label_issues(
    prepared: Prepared,
    trainer: TransferTrainer,
    output_dir: Path,
    checkpoint: str | None,
    talks: bool,
) -> dict[str, Any] | None:
    """Write `label_issues.csv` before the first step; called by all processes.

    A failure is a warning. The model and all random numbers are afterwards as they were. The features stay with the
    run, for who reads them before training.

    Args:
        prepared: data and model.
        trainer: made for them, before its first step.
        output_dir: of the run.
        checkpoint: that the run is resumed from, or "auto", if any: then the weights are not the pretrained ones, and
            what was found when the run began is kept.
        talks: whether it is said why nothing was looked for.

    Returns:
        For `results.json`: the numbers of wrong and doubtful labels and what they were found with, or why none were
        looked for; None without the key `label_issues`.
    """
    if not prepared.config.data.label_issues:
        return None
    path, is_main = output_dir / LABEL_ISSUES, trainer.is_world_process_zero()
    is_resumed = checkpoint is not None
    before = ((recorded(checkpoint, output_dir) or {}).get("before_training") or {}).get("label_issues")
    if before is not None and (path.is_file() or "skipped" in before):
        return before
    if is_resumed and path.is_file():  # of a version whose checkpoints do not say what was found
        with path.open(encoding="utf-8", newline="") as file:
            return _counts([row["verdict"] for row in csv.DictReader(file)])
    if reason := _why_not(prepared, trainer, is_resumed):
        if is_main and talks:
            say(f"Label issues: not looked for, because {reason}.")
        return {"skipped": reason}
    examples = Examples(prepared, _own_splits(prepared))
    try:
        prepared.frozen = features = examples.features(trainer.model, trainer.layer_groups)
        if not is_main:
            return None
        found = examples.judged(features)
    except UserError as error:
        if is_main:
            warnings.warn(f"label_issues: labels were not checked. {error}", stacklevel=2)
        return {"skipped": str(error)}
    found.save(path)
    return found.to_dict()


def _counts(verdicts: Sequence[str]) -> dict[str, Any]:
    return {verdict: verdicts.count(verdict) for verdict in (WRONG, DOUBTFUL)}


def _own_splits(prepared: Prepared) -> tuple[str, ...]:
    """The training split, and what the run held out from the same file."""
    return ("train", "validation") if prepared.data.drawn_from == "train" else ("train",)


def unsuited(prepared: Prepared) -> str:
    """Why labels cannot be judged with this model and data, as part of a sentence; empty if they can."""
    if prepared.stream is not None:
        return "the training data is a stream"
    if prepared.loaded.labels.problem_type == REGRESSION:
        return "the labels are numbers"
    return "the model is not pretrained" if prepared.config.model.from_scratch else ""


def _why_not(prepared: Prepared, trainer: TransferTrainer, is_resumed: bool) -> str:
    """Why a run does not look for label issues, as part of a sentence; empty if it does."""
    if reason := unsuited(prepared):
        return reason
    if is_resumed:
        return f"the run is resumed, and its first part left no {LABEL_ISSUES}"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "the model is sharded"
    count, classes = len(Examples(prepared, _own_splits(prepared)).split), len(prepared.loaded.labels.names)
    if count > MOST:
        return f"there are {count:,} examples, more than {MOST:,}"
    return f"{count:,} examples of {classes:,} classes take too long" if count * classes > MOST_VALUES else ""


# ---- the examples ---------------------------------------------------------------------------------------------------


class Examples:
    """The examples of several splits, one split after the other.

    Args:
        prepared: data and model.
        names: of the splits.

    Attributes:
        split: all of them.
    """

    def __init__(self, prepared: Prepared, names: Sequence[str]):
        self.prepared, self.names = prepared, tuple(names)
        parts = [prepared.data.splits[name].select_columns([*prepared.data.inputs, LABELS, ROW]) for name in self.names]
        self.split: Dataset = parts[0]
        if len(parts) > 1:
            self.split = concatenate_datasets([part.cast(parts[0].features) for part in parts])

    def features(
        self, model: nn.Module, groups: Sequence[LayerGroup], store: FeatureStore | None = None
    ) -> FrozenFeatures:
        """Means of the layers' outputs, and the input of the head; all processes must call it.

        Raises:
            UserError: they cannot be computed.
        """
        prepared, args = self.prepared, self.prepared.config.training
        dataset = prepared.task.prepare(
            self.split.remove_columns(ROW), prepared.inputs, prepared.processor, prepared.config.data
        )
        return frozen_pass(
            prepared,
            model,
            groups,
            dataset,
            poolings=[MEAN],
            store=store,
            autocast=torch.bfloat16 if args.bf16 else None,
            num_workers=max(args.dataloader_num_workers, 0),
        )

    def judged(self, features: FrozenFeatures) -> LabelIssues:
        """What is said of the labels.

        Raises:
            UserError: there is nothing to compare labels with.
        """
        began, labels = time.perf_counter(), torch.tensor(self.split[LABELS][:])
        judgment, layers = judge_features(features, labels, self.prepared.config.split_seed)
        return LabelIssues(
            issues=self._named(judgment.issues),
            judged=len(labels) - judgment.left_out,
            left_out=judgment.left_out,
            classes_left_out=judgment.classes_left_out,
            agreement=judgment.agreement,
            layers=layers,
            l2=judgment.l2,
            seconds=time.perf_counter() - began,
        )

    def _named(self, issues: Sequence[LabelIssue]) -> tuple[QuestionableLabel, ...]:
        """The issues with the places, labels and inputs that the user knows them by."""
        data, classes = self.prepared.data, self.prepared.loaded.labels.names
        rows, places, first = [issue.row for issue in issues], dict[int, str](), 0
        for name in self.names:
            own = [row for row in rows if first <= row < first + len(data.splits[name])]
            places |= dict(zip(own, data.places(name, [row - first for row in own]), strict=True))
            first += len(data.splits[name])
        examples = undecoded(self.split.select(rows), data.inputs)
        return tuple(
            QuestionableLabel(
                place=places[issue.row],
                verdict=WRONG if issue.looks_wrong else DOUBTFUL,
                given=_BETWEEN.join(classes[i] for i in issue.given),
                suggested=_BETWEEN.join(classes[i] for i in issue.suggested),
                probability=issue.probability,
                score=issue.score,
                inputs={name: _shown(example[name]) for name in data.inputs},
            )
            for issue, example in zip(issues, examples, strict=True)
        )


def _shown(value: Any) -> str:
    """A text, or the path of an image; empty for an image without one."""
    return str(value.get("path") or "") if isinstance(value, dict) else str(value)
