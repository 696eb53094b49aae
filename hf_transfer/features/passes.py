"""One pass over a dataset with a frozen model: batches, progress, and what the ranks computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import logging

from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import NUMBERS, Numbered, NumberedCollator, StoredInputs, lengths_of
from hf_transfer.features.ranks import Ranks
from hf_transfer.layers.side_effects import untouched

_SILENT = 3.0  # seconds without a progress bar


def run_pass(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    batches: Sequence[list[int]],
    visit: Callable[[list[int], Batch], None],
    *,
    prepare: Callable[[Batch], Batch],
    autocast: contextlib.AbstractContextManager[Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    shows_progress: bool = True,
) -> None:
    """Visit this process's batches with the model in eval mode and without gradient.

    Afterwards the model is as before, bit for bit: modes, buffers, attributes; and so are the random number generators.

    Args:
        model: the visited one.
        dataset: map-style.
        collate: makes a batch from a list of examples.
        batches: numbers of the examples of each batch.
        visit: gets the numbers of the examples and their batch.
        prepare: moves a batch to the model's device.
        autocast: a context for the forward passes.
        num_workers: processes that load batches.
        pin_memory: whether the loader page-locks batches.
        shows_progress: whether a pass of more than a few seconds shows a progress bar on stderr.
    """
    stored = StoredInputs()
    loader = DataLoader(
        Numbered(dataset, stored),
        batch_sampler=batches,
        collate_fn=NumberedCollator(collate, stored),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    total, is_silent = sum(map(len, batches)), logging.get_verbosity() >= logging.ERROR
    hidden = None if shows_progress and not is_silent else True  # None: only in a terminal
    with (
        untouched(model),
        torch.no_grad(),
        contextlib.nullcontext() if autocast is None else autocast,
        tqdm(total=total, desc="features", unit="ex", delay=_SILENT, disable=hidden, leave=False) as bar,
    ):
        model.eval()
        for loaded in loader:
            numbers = loaded.pop(NUMBERS)
            visit(numbers, prepare(loaded))
            bar.update(len(numbers))


def text_lengths(dataset: Any) -> list[int] | None:
    """Token positions of each text, without padding; None if the examples are not texts."""
    if isinstance(dataset, datasets.Dataset):
        is_text = "input_ids" in dataset.column_names
    else:
        first = dataset[0]
        is_text = isinstance(first, dict) and "input_ids" in first
    return lengths_of(dataset) if is_text else None


def in_order(ranks: Ranks, batches: list[tuple[list[int], Any]]) -> tuple[torch.Tensor, ...]:
    """The tensors of all ranks' batches, in the order of the dataset.

    Args:
        ranks: all must call it.
        batches: for each batch of this rank, (numbers of its examples, tensors of one row per example).
    """
    everything = [batch for own in ranks.gather(batches) for batch in own]
    order = torch.tensor([number for numbers, _ in everything for number in numbers]).argsort()
    return tuple(torch.cat(parts)[order] for parts in zip(*(tensors for _, tensors in everything), strict=True))
