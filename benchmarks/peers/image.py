"""EfficientNet-Lite0 on handwritten digits: examples, fresh models, ours, and the ways of plain Trainer and of timm."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, set_seed

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.bundled import load_dataset
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.tasks.image_classification import ImageClassification

from . import trainers
from .race import Outcome

BATCH = 32
HELD_OUT = 360  # the whole test split
NAMES = tuple("0123456789")
SETTINGS = {"model": "bundled:efficientnet-lite0", "data": "bundled:digits", "batch": BATCH}
ABOUT = "EfficientNet-Lite0 (bundled:efficientnet-lite0) on scikit-learn's digits, batch 32"
CLOCK = "The clock covers decoding and resizing, and all that is computed ahead."
BATCH_NORM = (
    "BatchNorm of this model keeps 99% of its running statistics at each step: sides that leave it in train mode are "
    "evaluated with others than they trained with."
)
TASK = ImageClassification()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_size", type=int, default=96, help="pixels of the square input; 224 is the model's own")


@cache
def _digits() -> DatasetDict:
    return load_dataset("bundled:digits")


def examples(seed: int, options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """(to train on, drawn by the seed; held out, always the same), with `image` and `label`."""
    digits = _digits()
    train = digits["train"].shuffle(seed=seed).select(range(options.examples)).flatten_indices()
    return train, digits["test"].shuffle(seed=0).select(range(options.held_out)).flatten_indices()


def fresh(seed: int, options: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """(model, image processor): the same head for the same seed."""
    set_seed(seed)
    model = ModelArguments(model_name_or_path=SETTINGS["model"])
    data = DataArguments(image_size=options.image_size)
    loaded, processor = TASK.load(model, data, Labels("single_label_classification", NAMES))
    return loaded.model, processor


def prepared(data: Dataset, processor: Any) -> Dataset:
    """Decoded, resized and normalised as each is asked for, as the example script does."""
    return TASK.prepare(data.rename_column("label", LABELS), ("image",), processor, DataArguments())


def race_side(
    keys: dict[str, Any],
    seed: int,
    options: argparse.Namespace,
    freeze: Callable[[PreTrainedModel], None] | None = None,
) -> Outcome:
    """An outcome: ours, or plain Trainer where `freeze` is given (see `trainers.fit`)."""
    train, held_out = examples(seed, options)
    model, processor = fresh(seed, options)
    outcome = trainers.fit(
        model,
        lambda: (prepared(train, processor), TASK.collator(processor)),
        seed,
        options,
        BATCH,
        {"remove_unused_columns": False, **keys},
        freeze,
    )
    return {**outcome, "accuracy": accuracy(lambda x: model(pixel_values=x).logits, model, held_out, processor)}


def ours(**keys: Any) -> Callable[[int, argparse.Namespace], Outcome]:
    """A side of ours."""
    return partial(race_side, keys)


def plain(freeze: Callable[[PreTrainedModel], None], **keys: Any) -> Callable[[int, argparse.Namespace], Outcome]:
    """A side of plain Trainer."""
    return partial(race_side, keys, freeze=freeze)


def freeze_backbone(model: PreTrainedModel) -> None:
    """What scripts do for feature extraction: no gradient; BatchNorm stays in train mode."""
    model.requires_grad_(False)
    model.timm_model.get_classifier().requires_grad_(True)


def freeze_backbone_in_eval(model: PreTrainedModel) -> None:
    """With care: BatchNorm by the pretrained statistics, whatever `model.train()` says."""
    freeze_backbone(model)
    model.eval()
    model.train = lambda mode=True: model


def accuracy(
    logits: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, held_out: Dataset, processor: Any
) -> float:
    """On `held_out`, with `module` in eval."""
    module.eval()
    rows = prepared(held_out, processor)
    found = []
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        found.append((torch.stack(list(batch["pixel_values"])), torch.tensor(batch[LABELS])))
    return trainers.accuracy(logits, found)
