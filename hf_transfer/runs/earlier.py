"""What a run reads of an earlier task, against forgetting: data to replay, data for the Fisher information, a teacher,
data to watch what is forgotten.

All of it is read and checked before the trainer is made. The Fisher information is computed once the run is known to be
possible, and kept in the run's folder, where a resumed run finds it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_transfer.data.augment import Chance
from hf_transfer.data.labels import Labels
from hf_transfer.data.record import content_of
from hf_transfer.data.replay import Replay
from hf_transfer.data.splits import Data
from hf_transfer.errors import UserError
from hf_transfer.layers.identity import identity_of
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.load import Loaded
from hf_transfer.objectives.fisher import Fisher
from hf_transfer.runs.earlier_data import read_examples
from hf_transfer.runs.fisher import OldTask, consolidate, old_task
from hf_transfer.runs.old_head import REPLAY as _REPLAY
from hf_transfer.runs.old_head import OldHead
from hf_transfer.runs.own_task import OwnTask
from hf_transfer.runs.teacher import load_teacher
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task
from hf_transfer.training import keeping
from hf_transfer.training.run_subject import sampled
from hf_transfer.training.trainer import TransferTrainer


@dataclass
class Earlier:
    """What was read.

    Attributes:
        replay: examples in the run's input columns; None without `replay_dataset_name`.
        replay_head: the checkpoint's own head, of whose labels theirs are; None where they have labels of the run.
        old_task: for the Fisher information; None without `ewc_dataset_name`, and once it is computed.
        teacher: a model with the labels of the run; None without `teacher_model_name_or_path`.
        order: of the teacher's outputs, as the run's labels are ordered.
        watched: the checkpoint's own task; None without `forgetting_dataset_name`.
        notes: messages for the user.
    """

    replay: Dataset | None
    replay_head: OldHead | None
    old_task: OldTask | None
    teacher: torch.nn.Module | None
    order: tuple[int, ...]
    watched: OwnTask | None
    notes: tuple[str, ...]


def read_earlier(config: Config, task: Task, data: Data, loaded: Loaded, processor: Any) -> Earlier:
    """Read what the keys name.

    Args:
        config: of the run, with the data keys as they were given.
        task: what the model reads.
        data: the run's own splits.
        loaded: its model.
        processor: its tokenizer or image processor.

    Raises:
        UserError: it does not exist, or does not fit the run.
    """
    args, notes = config.training, list[str]()
    replay, head, old, teacher, order, watched = None, None, None, None, tuple[int, ...](), None
    if args.replay_dataset_name:
        replay, head = _replayed(config, task, data, loaded.labels, notes)
    if args.ewc_dataset_name:
        old = old_task(config, task)
        notes.append(f"EWC: Fisher information of {len(old.rows):,} examples of {args.ewc_dataset_name}.")
    if args.teacher_model_name_or_path:
        with torch.random.fork_rng(devices=[]):
            teacher, order = load_teacher(config, task, data, loaded.labels, processor)
    if args.forgetting_dataset_name:
        watched = _watched(config)
        notes += watched.notes
    return Earlier(replay, head, old, teacher, order, watched, tuple(notes))


def equip(
    trainer: TransferTrainer,
    earlier: Earlier,
    config: Config,
    task: Task,
    data: Data,
    loaded: Loaded,
    processor: Any,
    chance: Chance,
) -> None:
    """Give a trainer what was read, before its plan is resolved.

    Raises:
        UserError: it does not fit the trainer.
    """
    args, plain = trainer.args, plain_names(trainer.model)
    if trainer.layer_groups:
        head = {plain[name] for name in trainer.layer_groups[-1].parameters}
        trainer.keeps_head = not (head & set(loaded.fresh) or config.model.from_scratch)
    if args.ewc_fisher_file:
        content = Path(args.ewc_fisher_file).expanduser().read_bytes()
        trainer.data_keys["the Fisher information"] = hashlib.sha256(content).hexdigest()[:16]
    if earlier.old_task is not None:
        trainer.data_keys["the examples of ewc_dataset_name"] = sampled(earlier.old_task.rows)
    if earlier.teacher is not None:
        trainer.data_keys["the teacher's weights"] = identity_of(earlier.teacher)["weights"]
        keeping.teach(trainer, earlier.teacher, loaded.labels.problem_type, earlier.order)
    if earlier.watched is not None:
        earlier.watched.check(trainer.model)
        trainer.data_keys["the examples of forgetting_dataset_name"] = earlier.watched.digest
    if earlier.replay is None:
        return
    if args.probe_solver == "lbfgs":
        raise UserError("probe_solver: lbfgs solves for the head on the training set alone.", "Leave one.", key=_REPLAY)
    trainer.data_keys["replayed examples"] = f"{len(earlier.replay)} {sampled(earlier.replay)}"
    prepared = task.prepare_training(earlier.replay, data.inputs, processor, config.data, chance)
    if earlier.replay_head is not None:
        trainer.data_keys["the old head's weights"] = earlier.replay_head.digest
        earlier.replay_head.put(trainer, task.collator(processor)([prepared[0]]))
    trainer.replay = Replay(prepared, args.replay_fraction, apart=earlier.replay_head is not None)


def add_fisher(trainer: TransferTrainer, earlier: Earlier, config: Config, task: Task, folder: Path) -> Fisher | None:
    """Compute the Fisher information, or find it in the run's folder, and let its data go; None if none is wanted."""
    old, earlier.old_task = earlier.old_task, None
    return None if old is None else consolidate(trainer, old, config, task, folder)


def _watched(config: Config) -> OwnTask:
    """The checkpoint's own task, on the CPU until it is watched.

    Raises:
        UserError: see `OwnTask`.
    """
    args, model = config.training, config.model
    assert args.forgetting_dataset_name is not None
    with args.main_process_first(desc="forgetting_dataset_name"), torch.random.fork_rng(devices=[]):
        task = OwnTask(
            str(model.model_name_or_path),
            args.forgetting_dataset_name,
            args.max_forgetting_samples,
            trust_remote_code=model.trust_remote_code,
            allow_pickle=model.allow_pickle,
            model_revision=model.model_revision,
            per_device_eval_batch_size=args.per_device_eval_batch_size,
        )
    task.predictor.model.to("cpu")
    return task


# ---- replay ----------------------------------------------------------------------------------------------------------


def _replayed(
    config: Config, task: Task, data: Data, labels: Labels, notes: list[str]
) -> tuple[Dataset, OldHead | None]:
    """(the examples to replay, in the input columns of the run's own data; the head that they are for, if not its own).

    Raises:
        UserError: they have other inputs than the run, or labels of neither the run nor its checkpoint.
    """
    args, head = config.training, None
    name = args.replay_dataset_name
    assert name is not None
    try:
        rows, inputs, _ = read_examples(config, task, name, labels, _REPLAY)
    except UserError as error:
        if "unknown label" not in error.problem:
            raise
        head = OldHead.of(config, task, error)
        try:
            rows, inputs, _ = read_examples(config, task, name, head.loaded.labels, _REPLAY)
        except UserError as again:
            raise head.refused(error) from again
    if len(inputs) != len(data.inputs):
        raise UserError(
            f"{name!r} has the inputs {' and '.join(inputs)}, and the training set {' and '.join(data.inputs)}.",
            "Name columns that both have with text_column_name.",
            key=_REPLAY,
        )
    if inputs != data.inputs:
        rows = rows.remove_columns([c for c in data.inputs if c in rows.column_names and c not in inputs])
        rows = rows.rename_columns({a: b for a, b in zip(inputs, data.inputs, strict=True) if a != b})
    rows = _without_held_out(rows, data, name, notes, drops=config.data.drop_leaks)
    by = f", answered by the head of {config.model.model_name_or_path}, which is kept" if head else ""
    notes.append(f"Replay: {len(rows):,} examples of {name}, {args.replay_fraction:.4g} of each batch{by}.")
    return rows, head


def _without_held_out(rows: Dataset, data: Data, name: str, notes: list[str], drops: bool) -> Dataset:
    """The examples, without those that the run measures on if `drops`; a note otherwise.

    Raises:
        UserError: none is left.
    """
    content = content_of(rows, data.inputs)
    held_out = [content_of(split, data.inputs) for n, split in data.splits.items() if n != "train"]
    shared = np.isin(content, np.concatenate(held_out)) if held_out else np.zeros(len(rows), bool)
    if not shared.any():
        return rows
    if not drops:
        notes.append(
            f"{int(shared.sum()):,} examples of {name} also occur in the validation or test split; drop_leaks: true "
            "keeps them from being replayed."
        )
        return rows
    if shared.all():
        raise UserError(f"every example of {name!r} is in the validation or test split.", key=_REPLAY)
    notes.append(f"Left out of the replay: {int(shared.sum()):,} examples of the validation or test split.")
    return rows.select(np.flatnonzero(~shared))
