"""The Fisher information of a run with `ewc_dataset_name`: of the checkpoint's own head, on its own task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from hf_transfer.errors import UserError, listed
from hf_transfer.layers.identity import identity_of
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.load import Loaded
from hf_transfer.objectives.fisher import Fisher, estimate
from hf_transfer.run_folder import FISHER
from hf_transfer.runs.earlier_data import read_examples
from hf_transfer.runs.old_head import with_own_head
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task
from hf_transfer.training import keeping
from hf_transfer.training.console import is_silent
from hf_transfer.training.run_subject import sampled
from hf_transfer.training.trainer import TransferTrainer

_KEY = "ewc_dataset_name"


@dataclass
class OldTask:
    """What the checkpoint was trained on.

    Attributes:
        rows: examples, with labels as its head has them.
        inputs: their input columns.
        loaded: the checkpoint with its own head.
        processor: its tokenizer or image processor.
    """

    rows: Dataset
    inputs: tuple[str, ...]
    loaded: Loaded
    processor: Any


def old_task(config: Config, task: Task) -> OldTask:
    """Read the examples and the checkpoint.

    Raises:
        UserError: the checkpoint has no head, or the data has other labels.
    """
    args = config.training
    loaded, processor = with_own_head(config, task)
    if loaded.fresh:
        raise UserError(
            f"the Fisher information is that of the checkpoint's own answers, and {config.model.model_name_or_path!r} "
            f"has no trained head ({listed(loaded.fresh, 2)} would be random).",
            "Start from a model that was trained on the earlier task, or use l2_sp_alpha, which needs none.",
            key=_KEY,
        )
    assert args.ewc_dataset_name is not None
    rows, inputs, _ = read_examples(config, task, args.ewc_dataset_name, loaded.labels, _KEY)
    drawn = np.random.default_rng(config.split_seed).permutation(len(rows))[: args.ewc_samples]
    return OldTask(rows.select(np.sort(drawn)), inputs, loaded, processor)


def consolidate(trainer: TransferTrainer, old: OldTask, config: Config, task: Task, folder: Path) -> Fisher:
    """Add the penalty of EWC to a trainer; returns what is to be kept in the run's folder.

    Args:
        trainer: before its first step.
        old: what the information is of.
        config: of the run.
        task: what the model reads.
        folder: of the run, where an interrupted one has left it.
    """
    args, seed, rows, model = trainer.args, config.split_seed, old.rows, old.loaded.model
    about = {"kind": args.ewc_fisher, "examples": len(rows), "dataset": sampled(rows), "seed": seed}
    tensors = identity_of(model)["tensors"]
    fisher = _kept(folder / FISHER, about, tensors)
    if fisher is None:
        model = model.to(args.device)
        prepared = task.prepare(rows, old.inputs, old.processor, config.data)
        collate = task.collator(old.processor)
        examples = ({k: v.to(args.device) for k, v in collate([row]).items()} for row in _shown(prepared, trainer))
        values = estimate(model, examples, args.ewc_fisher, old.loaded.labels.problem_type, seed)
        plain = plain_names(model)
        fisher = Fisher({plain[name]: value.cpu() for name, value in values.items()}, tensors, about)
    keeping.consolidate(trainer, fisher)
    return fisher


def _shown(rows: Dataset, trainer: TransferTrainer) -> Iterator[Any]:
    """The examples, with a progress bar where that takes more than a few seconds."""
    hides = trainer.args.disable_tqdm or is_silent(trainer.args) or not trainer.is_world_process_zero()
    bar = tqdm(
        range(len(rows)), desc="Fisher information", unit="example", delay=3.0, disable=hides or None, leave=False
    )
    for number in bar:
        yield rows[number]


def _kept(path: Path, about: dict[str, Any], tensors: dict[str, str]) -> Fisher | None:
    """What an interrupted run has left, if it is the same."""
    if not path.is_file():
        return None
    try:
        fisher = Fisher.load(path)
    except UserError:
        return None
    return fisher if dict(fisher.about) == about and dict(fisher.tensors) == tensors else None
