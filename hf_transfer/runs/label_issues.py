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

from hf_transfer.analysis.label_issues import Judgment, judge_features
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import LABELS, REGRESSION
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError
from hf_transfer.features import FeatureStore, FrozenFeatures, frozen_features
from hf_transfer.features.layouts import MEAN
from hf_transfer.files import say, write_bytes
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.run_folder import LABEL_ISSUES
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer

MOST = 20_000  # examples: more take minutes to solve for on one core
_COLUMNS = ("place", "given", "suggested", "score")
_BETWEEN = "; "  # names of several labels


@dataclass(frozen=True)
class WrongLabel:
    """An example whose label looks wrong.

    Attributes:
        place: file and line of the example, or its row in the split.
        given: names of its labels, separated by semicolons.
        suggested: likewise, those that it seems to have.
        score: 0 to 1, the lower the likelier the label is wrong.
        inputs: the example: texts, or the path of an image, if it has one.
    """

    place: str
    given: str
    suggested: str
    score: float
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class LabelIssues:
    """Labels that look wrong.

    Attributes:
        wrong: the examples, the likeliest first.
        judged: number of examples whose label was judged.
        left_out: number of other examples: no second example has their class.
        agreement: fraction of the labels that held-out predictions agree with.
        layer: layer group whose features they are made from: the mean of its output, or the input of the head.
        l2: strength of the heads' penalty.
        seconds: that it took.
    """

    wrong: tuple[WrongLabel, ...]
    judged: int
    left_out: int
    agreement: float
    layer: str
    l2: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`, without the examples."""
        return {"issues": len(self.wrong)} | {n: v for n, v in vars(self).items() if n != "wrong"}

    def save(self, path: Path) -> None:
        """Write a CSV file with one row per example, also if there are none."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        names = list(self.wrong[0].inputs) if self.wrong else []
        writer.writerow([*_COLUMNS, *(f"input {name}" if name in _COLUMNS else name for name in names)])
        for example in self.wrong:
            score = f"{example.score:.4f}"
            writer.writerow([example.place, example.given, example.suggested, score, *example.inputs.values()])
        write_bytes(path, file.getvalue().encode("utf-8", "backslashreplace"))


# ---- in a run --------------------------------------------------------------------------------------------------------


def write_label_issues(
    prepared: Prepared, trainer: TransferTrainer, output_dir: Path, is_resumed: bool, talks: bool
) -> dict[str, Any] | None:
    """Write `label_issues.csv` before the first step; called by all processes.

    A failure is a warning. The model and all random numbers are afterwards as they were.

    Args:
        prepared: data and model.
        trainer: made for them, before its first step.
        output_dir: of the run.
        is_resumed: whether the run goes on: then the weights are not the pretrained ones, and the file is kept.
        talks: whether it is said why nothing was looked for.

    Returns:
        For `results.json`: the number of issues and what they were found with, or why none were looked for; None
        without the key `label_issues`.
    """
    if not prepared.config.data.label_issues:
        return None
    path, is_main = output_dir / LABEL_ISSUES, trainer.is_world_process_zero()
    if is_resumed and path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            return {"issues": sum(1 for _ in csv.reader(file)) - 1}
    if reason := _why_not(prepared, trainer, is_resumed):
        if is_main and talks:
            say(f"Label issues: not looked for, because {reason}.")
        return {"skipped": reason}
    try:
        found = find(prepared, trainer.model, trainer.layer_groups, _own_splits(prepared))
    except UserError as error:
        if is_main:
            warnings.warn(f"label_issues: none were looked for. {error}", stacklevel=2)
        return {"skipped": str(error)}
    if is_main:
        found.save(path)
    return found.to_dict()


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
    count = sum(len(prepared.data.splits[name]) for name in _own_splits(prepared))
    return f"there are {count:,} examples, more than {MOST:,}" if count > MOST else ""


# ---- the examples ---------------------------------------------------------------------------------------------------


def find(
    prepared: Prepared,
    model: nn.Module,
    groups: Sequence[LayerGroup],
    names: Sequence[str],
    store: FeatureStore | None = None,
) -> LabelIssues:
    """The label issues of these splits; processes share the features, and each judges them.

    Raises:
        UserError: the features cannot be computed, or the labels cannot be judged.
    """
    began = time.perf_counter()
    split = _together(prepared, names)
    features = _features(prepared, model, groups, split, store)
    labels = torch.tensor(split[LABELS][:])
    judgment, layer = judge_features(features, labels, prepared.config.split_seed)
    return LabelIssues(
        wrong=_named(prepared, judgment, names, split),
        judged=len(labels) - judgment.left_out,
        left_out=judgment.left_out,
        agreement=judgment.agreement,
        layer=layer,
        l2=judgment.l2,
        seconds=time.perf_counter() - began,
    )


def _together(prepared: Prepared, names: Sequence[str]) -> Dataset:
    """The examples of several splits, one split after the other."""
    splits = prepared.data.splits
    parts = [splits[name].select_columns([*prepared.data.inputs, LABELS, ROW]) for name in names]
    return concatenate_datasets([part.cast(parts[0].features) for part in parts]) if len(parts) > 1 else parts[0]


def _features(
    prepared: Prepared, model: nn.Module, groups: Sequence[LayerGroup], split: Dataset, store: FeatureStore | None
) -> FrozenFeatures:
    """Means of the layers' outputs, and the input of the head."""
    args, task = prepared.config.training, prepared.task
    dataset = task.prepare(split.remove_columns(ROW), prepared.inputs, prepared.processor, prepared.config.data)
    return frozen_features(
        model,
        groups,
        dataset,
        collate=task.collator(prepared.processor),
        poolings=[MEAN],
        store=store,
        batch_size=args.eval_batch_size,
        autocast=torch.bfloat16 if args.bf16 else None,
        num_workers=max(args.dataloader_num_workers, 0),
    )


def _named(prepared: Prepared, judgment: Judgment, names: Sequence[str], split: Dataset) -> tuple[WrongLabel, ...]:
    """The issues with the places, labels and inputs that the user knows them by."""
    rows = [issue.row for issue in judgment.issues]
    classes, places, first = prepared.loaded.labels.names, dict[int, str](), 0
    for name in names:
        count = len(prepared.data.splits[name])
        own = [row for row in rows if first <= row < first + count]
        places |= dict(zip(own, prepared.data.places(name, [row - first for row in own]), strict=True))
        first += count
    examples = undecoded(split.select(rows), prepared.data.inputs)
    return tuple(
        WrongLabel(
            place=places[issue.row],
            given=_BETWEEN.join(classes[i] for i in issue.given),
            suggested=_BETWEEN.join(classes[i] for i in issue.suggested),
            score=issue.score,
            inputs={name: _shown(example[name]) for name in prepared.data.inputs},
        )
        for issue, example in zip(judgment.issues, examples, strict=True)
    )


def _shown(value: Any) -> str:
    """A text, or the path of an image; empty for an image without one."""
    return str(value.get("path") or "") if isinstance(value, dict) else str(value)
