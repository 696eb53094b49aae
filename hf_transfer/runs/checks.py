"""Checks of a run's keys that need the labels, the data or the model, but no trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.data.labels import Labels
from hf_transfer.errors import UserError, nearest, one_line
from hf_transfer.evaluation import metric_table
from hf_transfer.models.load import Loaded
from hf_transfer.runs.machine import removed_if_empty
from hf_transfer.training.arguments import TransferArguments


def check_best(args: TransferArguments, labels: Labels) -> None:
    """Check `metric_for_best_model`, which Trainer reads only after the first epoch.

    Raises:
        UserError: there is no such metric.
    """
    available = (metric_table.LOSS, *metric_table.names(labels.problem_type, len(labels.names)))
    wanted = (args.metric_for_best_model or metric_table.LOSS).removeprefix("eval_")
    if wanted not in available:
        raise UserError(
            f"unknown metric {args.metric_for_best_model!r} for {labels.problem_type}.",
            f"Available metrics: {', '.join(available)}.{nearest(wanted, available)}",
            key="metric_for_best_model",
        )


def check_grown(loaded: Loaded, args: TransferArguments) -> None:
    """Raises:
    UserError: embeddings were added, which an adapter would not save.
    """
    if loaded.grown and (is_adapted(loaded.model) or args.adapter not in (None, "none")):
        raise UserError(
            f"the tokenizer has {loaded.grown} more tokens than the model has embeddings, and an adapter does not save "
            "embeddings.",
            "Resize and save the model first (model.resize_token_embeddings), or train without an adapter.",
            key="adapter",
        )


def check_batches(args: TransferArguments, examples: int) -> None:
    """Raises:
    UserError: an epoch would have no batch.
    """
    size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and examples < size:
        raise UserError(
            f"{args.per_device_train_batch_size} gives a global batch size of {size}, there are only {examples} "
            "training examples, and dataloader_drop_last drops incomplete batches.",
            "Use a smaller batch size, or remove dataloader_drop_last.",
            key="per_device_train_batch_size",
        )


@contextlib.contextmanager
def trainer_errors(output_dir: Path) -> Iterator[None]:
    """Context in which errors of Trainer's constructor, such as a missing tracker, become `UserError`s."""
    try:
        with removed_if_empty(output_dir, is_new=not output_dir.exists()):  # Trainer creates it before it has checked
            yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(one_line(error)) from error
