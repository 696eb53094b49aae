"""A dataset as a model reads it: the columns that it takes, batches on its device, and the labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_transfer.errors import UserError
from hf_transfer.features.batches import Batch, equal
from hf_transfer.features.examples import is_numbered
from hf_transfer.features.ranks import Ranks
from hf_transfer.layers.wrappers import core_of, pretrained

LABELS = ("labels", "label", "label_ids")  # as in transformers' collators


@dataclass(frozen=True)
class Reader:
    """A dataset, and how batches for a model are made from it.

    Attributes:
        dataset: without columns that the model does not take, if it has columns; with its labels.
        collate: makes a batch from a list of examples.
        names: of the model's inputs.
        main: the input that a batch must have.
        device: of the model.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    names: tuple[str, ...]
    main: str
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, dataset: Any, collate: Callable[[list[Any]], Any]) -> Reader:
        """A dataset for `model`.

        Raises:
            UserError: the dataset is a stream, is empty, or lacks the model's main input; the weights are sharded.
        """
        if any(isinstance(p, DTensor) or p.is_meta for p in model.parameters()):
            raise UserError(
                "The model's weights are sharded or not loaded, and features need all of them in each process.",
                "Compute features before FSDP or DeepSpeed shards the model.",
            )
        if not is_numbered(dataset):
            raise UserError(
                "The dataset is a stream, and features are kept by example, in an order that does not change.",
                "Use a map-style dataset (streaming: false).",
            )
        if not len(dataset):
            raise UserError("The dataset has no examples to compute features of.")
        core = core_of(model)[1]
        parameters = inspect.signature(core.forward).parameters.values()
        named = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        known = pretrained(core)
        main = named[0] if known is None else known.main_input_name
        device = next(model.parameters()).device
        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
            kept = [name for name in dataset.column_names if name in (*named, *LABELS)]
            if main in dataset.column_names:
                dataset = dataset.select_columns(kept)
            elif known is not None:
                raise _no_input(model, main, dataset.column_names)
        return cls(dataset, collate, named, main, device)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """A batch of these examples, on the model's device.

        Raises:
            UserError: the model's main input is missing.
        """
        return self.prepared(self.collate([self.dataset[int(number)] for number in numbers]))

    def prepared(self, batch: Any) -> Batch:
        """A batch with what the model takes, on its device; its labels stay where they are.

        Raises:
            UserError: the model's main input is missing.
        """
        tensors = dict(batch)
        inputs = {n: v.to(self.device) if torch.is_tensor(v) else v for n, v in tensors.items() if n in self.names}
        if self.main not in inputs:
            others = [name for name in tensors if name not in LABELS]
            if any(name in inputs for name in ("inputs_embeds",)):
                return inputs
            if len(others) != 1 or not torch.is_tensor(tensors[others[0]]) or inputs:
                raise _no_input(None, self.main, others)
            inputs = {self.main: tensors[others[0]].to(self.device)}  # a timm model calls its images x
        return inputs | ({"labels": tensors["labels"]} if "labels" in tensors else {})

    def check_fixed(self) -> None:
        """Check that an example is the same every time.

        Raises:
            UserError: it is drawn at random.
        """
        if not equal(dict(self.collate([self.dataset[0]])), dict(self.collate([self.dataset[0]]))):
            raise UserError(
                "The examples of the dataset are drawn at random (augmentation), and features are of one draw only.",
                "Use the dataset without augmentation.",
            )


def _no_input(model: nn.Module | None, main: str, columns: Sequence[str]) -> UserError:
    reader = "the model" if model is None else type(core_of(model)[1]).__name__
    return UserError(
        f"The dataset has no column {main!r}, which {reader} reads. Its columns are {', '.join(columns)}.",
        "Tokenize the texts, or preprocess the images, first.",
    )


def labels_of(dataset: Any, seen: list[tuple[list[int], torch.Tensor]], ranks: Ranks) -> Any:
    """Labels of all examples, in order: a tensor, or a list where they are no numbers; None without labels.

    Args:
        dataset: of the examples.
        seen: (numbers of examples, their labels) of batches that this rank collated.
        ranks: all must call it.
    """
    if isinstance(dataset, datasets.Dataset):
        name = next((name for name in LABELS if name in dataset.column_names), None)
        return None if name is None else dataset.select_columns([name]).with_format("torch")[:][name]
    known = {
        number: label
        for own in ranks.gather(seen)
        for numbers, labels in own
        for number, label in zip(numbers, labels, strict=True)
    }
    missing = [number for number in range(len(dataset)) if number not in known]
    for number in missing:
        item = dataset[number]
        name = next((name for name in LABELS if name in item), None) if isinstance(item, dict) else None
        if name is None:
            return None
        known[number] = torch.as_tensor(item[name])
    return torch.stack([known[number] for number in range(len(dataset))])
