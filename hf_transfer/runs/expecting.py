"""The accuracy to expect of a run, before it trains (`analysis.expected`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional

from hf_transfer.analysis.baselines import Distance, distance
from hf_transfer.analysis.expected import (
    HEAD_ALONE,
    LEAST,
    LEAST_PER_CLASS,
    MOST,
    TEXTS,
    WITH_BATCHNORM,
    Added,
    Expected,
    expected_accuracy,
    sample_of,
)
from hf_transfer.analysis.label_issues import layers_to_compare
from hf_transfer.analysis.model_ranking import answers_of
from hf_transfer.data.augment import EXAMPLE
from hf_transfer.data.labels import LABELS, SINGLE_LABEL
from hf_transfer.errors import UserError, one_line
from hf_transfer.features import FrozenFeatures
from hf_transfer.features.convex_head import SINGLE
from hf_transfer.features.cross_validation import strata, stratified_order
from hf_transfer.features.layouts import CLS, MEAN
from hf_transfer.files import say
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.frozen import running_statistics
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.models import pooling_layer
from hf_transfer.runs.decisions import recorded
from hf_transfer.runs.frozen_pass import frozen_pass
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.solvable import groups_of, has_adapter, has_new_head
from hf_transfer.training.trainer import TransferTrainer

_SIDE = 16  # pixels of a small picture


def expect(prepared: Prepared, trainer: TransferTrainer, asks_domain: bool = False) -> Expected | str:
    """The accuracy to expect, or why it cannot be said, as part of a sentence; all processes must call it.

    Model and random numbers are afterwards as they were.

    Args:
        prepared: the run, with its chosen keys.
        trainer: made for it, before its first step.
        asks_domain: whether the features are compared with the input itself, too.
    """
    if reason := _why_not(prepared, trainer):
        return reason
    rows, labels = sample(prepared)
    try:
        features = _features(prepared, trainer, rows)
    except UserError as error:
        return f"there are no frozen features: {one_line(error)}".rstrip(".")
    splits, classes, seed = prepared.data.splits, len(prepared.loaded.labels.names), prepared.config.split_seed
    split = prepared.measured
    found = expected_accuracy(
        features,
        labels,
        classes,
        examples=len(prepared.data.train),
        split=(split, len(splits[split])),
        added=_added(prepared, trainer),
        seed=seed,
    )
    if not asks_domain:
        return found
    answers = answers_of({found.layer: features[found.layer]}, labels, classes, seed)
    return replace(found, domain=distance(answers.right, answers.logme, _raw(prepared, rows), labels, seed))


def _raw(prepared: Prepared, rows: list[int]) -> Any:
    """The inputs without a model: texts, or gray pixels of a small picture, (examples, pixels)."""
    if not prepared.task.mixes:
        columns = [prepared.data.train.select(rows)[name][:] for name in prepared.inputs]
        return [" ".join(map(str, parts)) for parts in zip(*columns, strict=True)]
    images = inputs_of(prepared, rows)
    small = [functional.adaptive_avg_pool2d(images[i]["pixel_values"].mean(0)[None], _SIDE) for i in range(len(rows))]
    return torch.stack(small).flatten(1).double().numpy()


def expected_of(
    prepared: Prepared,
    trainer: TransferTrainer,
    issues: Mapping[str, Any] | None,
    checkpoint: str | None,
    talks: bool,
) -> dict[str, Any] | None:
    """What a run expects of itself, for `results.json`; None without the key, and where it would need its own pass.

    Args:
        prepared: the run.
        trainer: made for it, before its first step.
        issues: what was found out about its labels, from the same features.
        checkpoint: that the run is resumed from, or "auto", if any: what it expected when it began is kept.
        talks: whether the run says what it expects.
    """
    if checkpoint is not None:
        state = recorded(checkpoint, Path(str(prepared.config.training.output_dir))) or {}
        return state.get("before_training", {}).get("expected")  # not of an earlier version
    known = issues is not None and "skipped" not in issues
    (has_features,) = broadcast_object_list([known])  # on the main process
    if not prepared.config.data.expected_accuracy or not has_features:
        return None
    found = expect(prepared, trainer)
    if isinstance(found, str):
        return {"skipped": found}
    if talks and trainer.is_world_process_zero():
        say(found.line())
    return found.to_dict()


def lines_of(found: Expected | str) -> list[str]:
    """For display."""
    return [f"Expected accuracy: not predicted, because {found}."] if isinstance(found, str) else found.lines()


def unsuited(prepared: Prepared) -> str:
    """Why heads on frozen features cannot be compared by their accuracy on this data; empty if they can."""
    labels = prepared.loaded.labels
    if labels.problem_type != SINGLE_LABEL:
        return "accuracy is of one class per example"
    if prepared.stream is not None:
        return "the training data is a stream"
    count, classes = len(prepared.data.train), len(labels.names)
    if count < LEAST:
        return f"{count} training examples are too few for cross-validation"
    if min(count, MOST) < LEAST_PER_CLASS * classes:
        return f"{min(count, MOST)} examples of {classes:,} classes are too few for cross-validation"
    return ""


def sample(prepared: Prepared) -> tuple[list[int], torch.Tensor]:
    """(rows of the training examples that the model looks at, in the proportions of the classes; their labels)."""
    truth = torch.as_tensor(prepared.data.train[LABELS])
    rows = sample_of(stratified_order(strata(SINGLE, truth), prepared.config.split_seed))
    return rows, truth[rows]


def inputs_of(prepared: Prepared, rows: list[int]) -> Any:
    """Training examples as model inputs, not augmented."""
    train = prepared.data.train.select(rows)
    own = train.remove_columns([column for column in (EXAMPLE,) if column in train.column_names])
    return prepared.task.prepare(own, prepared.inputs, prepared.processor, prepared.config.data)


def by_layer(features: FrozenFeatures) -> dict[str, torch.Tensor]:
    """Matrices of the layers to compare, the last first: of equal ones it counts."""
    names = layers_to_compare(features.groups)
    return {name: features.matrix(name, None if name == HEAD else MEAN) for name in reversed(names)}


def head_inputs(
    prepared: Prepared,
    model: nn.Module,
    groups: Sequence[LayerGroup],
    dataset: Any,
    autocast: torch.dtype | None,
    found: FrozenFeatures | None = None,
    own: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """{layer: what the head reads of it}.

    Args:
        prepared: the run.
        model: on the device to compute on.
        groups: its layer groups.
        dataset: prepared examples.
        autocast: as in `features.frozen_features`.
        found: features that are known already; None to compute them.
        own: the rows of `found` that are the examples.
    """
    if found is None:
        found, own = _passed(prepared, model, groups, dataset, autocast)
    if HEAD in found.groups:
        return {HEAD: found.matrix(HEAD)[list(own)]}
    last = groups[-2].name
    if pooling_layer.reads_mean(model):
        return {last: found.matrix(last, MEAN)[list(own)]}
    first = frozen_pass(prepared, model, groups, dataset, layers=[last], poolings=[CLS], autocast=autocast)
    return {last: first.matrix(last, CLS)}


def _passed(
    prepared: Prepared, model: nn.Module, groups: Sequence[LayerGroup], dataset: Any, autocast: torch.dtype | None
) -> tuple[FrozenFeatures, list[int]]:
    found = frozen_pass(prepared, model, groups, dataset, poolings=[MEAN], autocast=autocast)
    return found, list(range(len(dataset)))


def _features(prepared: Prepared, trainer: TransferTrainer, rows: list[int]) -> Mapping[str, torch.Tensor]:
    """Of the layers that the head can learn from: what it reads, if nothing below it trains."""
    model, groups = trainer.model, trainer.layer_groups
    dataset = inputs_of(prepared, rows)
    autocast = torch.bfloat16 if trainer.args.bf16 else None
    found, own = prepared.frozen, rows
    if found is None:
        found, own = _passed(prepared, model, groups, dataset, autocast)
    if _is_head_alone(trainer):
        return head_inputs(prepared, model, groups, dataset, autocast, found, own)
    return {name: x[own] for name, x in by_layer(found).items()}


def domain_of_head(prepared: Prepared) -> Distance | None:
    """What the frozen features that the head reads are worth beside the input itself; None where it cannot be said.

    All processes must call it, and all have the same answer.
    """
    if unsuited(prepared):
        return None
    rows, labels = sample(prepared)
    model = prepared.loaded.model.to(prepared.config.training.device)
    autocast = torch.bfloat16 if prepared.config.training.bf16 else None
    try:
        features = head_inputs(prepared, model, groups_of(prepared), inputs_of(prepared, rows), autocast)
    except UserError:  # what else needs the features says why there are none
        return None
    seed = prepared.config.split_seed
    answers = answers_of(features, labels, len(prepared.loaded.labels.names), seed)
    (found,) = broadcast_object_list([distance(answers.right, answers.logme, _raw(prepared, rows), labels, seed)])
    return found


def _is_head_alone(trainer: TransferTrainer) -> bool:
    return trainer.plan is not None and all(set(stage.trainable) <= {HEAD} for stage in trainer.plan.stages)


def _added(prepared: Prepared, trainer: TransferTrainer) -> Added:
    """What training adds to the head on frozen features."""
    if _is_head_alone(trainer):
        return HEAD_ALONE
    return WITH_BATCHNORM if running_statistics(prepared.loaded.model) else TEXTS


def _why_not(prepared: Prepared, trainer: TransferTrainer) -> str:
    """Why nothing can be said, as part of a sentence; empty if it can."""
    values = prepared.config.values
    if reason := unsuited(prepared):
        return reason
    if values["from_scratch"] or values["strategy"] == "scratch":
        return "random weights have no features that say anything"
    if not has_adapter(prepared) and not has_new_head(prepared):  # an adapter renames parameters
        return "the checkpoint's head is kept, which knows more than its features"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "the model is sharded"
    if prepared.target is not None:
        return "with domain_adaptation the test data may be of another domain than the training data"
    return ""
