"""MiniLM-L6 on Rotten Tomatoes: examples, fresh models, ours and the ways of plain Trainer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator, set_seed

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.bundled import load_dataset
from hf_transfer.data.labels import Labels
from hf_transfer.tasks.text_classification import TextClassification

from . import trainers
from .race import Outcome

BATCH = 32
PADDED_LENGTH = 128  # the example script's `max_seq_length` and its default `pad_to_max_length`
SETTINGS = {"model": "bundled:minilm-l6", "data": "bundled:rotten-tomatoes", "batch": BATCH}
ABOUT = "MiniLM-L6 (bundled:minilm-l6) on Rotten Tomatoes, batch 32, AdamW, linear schedule"
CLOCK = "The clock covers tokenisation, and all that is computed ahead."


@cache
def _pool() -> Dataset:
    """All labelled sentences, of the test split first."""
    reviews = load_dataset("bundled:rotten-tomatoes")
    return concatenate_datasets([reviews["test"].shuffle(seed=0), reviews["train"].shuffle(seed=0)])


def examples(seed: int, options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """(to train on, drawn by the seed; held out, always the same), with `text` and `label`."""
    pool = _pool()
    held_out = pool.select(range(options.held_out)).flatten_indices()
    rest = pool.select(range(options.held_out, len(pool)))
    return rest.shuffle(seed=seed).select(range(options.examples)).flatten_indices(), held_out


def fresh(seed: int) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer): the same head for the same seed."""
    set_seed(seed)
    labels = Labels("single_label_classification", ("negative", "positive"))
    model = ModelArguments(model_name_or_path=SETTINGS["model"])
    loaded, tokenizer = TextClassification().load(model, DataArguments(max_seq_length=PADDED_LENGTH), labels)
    return loaded.model, tokenizer


def tokenised(data: Dataset, tokenizer: Any, padded: bool) -> Dataset:
    """As the example script: `map` over batches, cut at 128 tokens, and padded to it or not."""
    padding = "max_length" if padded else False
    return data.map(
        lambda rows: tokenizer(rows["text"], padding=padding, max_length=PADDED_LENGTH, truncation=True),
        batched=True,
        remove_columns=["text"],
    )


class Counting:
    """A collator that also counts cells and tokens of the batches it makes."""

    def __init__(self) -> None:
        self.cells = self.tokens = 0

    def count(self, batch: Any) -> Any:
        if "attention_mask" in batch:
            self.cells += batch["attention_mask"].numel()
            self.tokens += int(batch["attention_mask"].sum())
        return batch

    @property
    def share(self) -> float | None:
        """The share of cells that hold no token; None where no batch of tokens was made."""
        return 1 - self.tokens / self.cells if self.cells else None


class Dynamic(DataCollatorWithPadding, Counting):
    """Pads to the longest of the batch."""

    def __init__(self, tokenizer: Any):
        DataCollatorWithPadding.__init__(self, tokenizer)
        Counting.__init__(self)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        return self.count(super().__call__(features))


class Stacked(Counting):
    """For rows that are padded already: transformers' default collator."""

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        return self.count(default_data_collator(features))


def race_side(
    keys: dict[str, Any],
    seed: int,
    options: argparse.Namespace,
    freeze: Callable[[PreTrainedModel], None] | None = None,
    padded: bool = False,
) -> Outcome:
    """An outcome: ours, or plain Trainer where `freeze` is given (see `trainers.fit`)."""
    train, held_out = examples(seed, options)
    model, tokenizer = fresh(seed)
    collator = Stacked() if padded else Dynamic(tokenizer)
    outcome = trainers.fit(
        model,
        lambda: (tokenised(train, tokenizer, padded), collator),
        seed,
        options,
        BATCH,
        keys,
        freeze,
        processing_class=tokenizer,
    )
    return {**outcome, "padding": collator.share, "accuracy": accuracy(model, tokenizer, held_out)}


def ours(**keys: Any) -> Callable[[int, argparse.Namespace], Outcome]:
    """A side of ours."""
    return partial(race_side, keys)


def plain(
    freeze: Callable[[PreTrainedModel], None], padded: bool = False, **keys: Any
) -> Callable[[int, argparse.Namespace], Outcome]:
    """A side of plain Trainer."""
    return partial(race_side, keys, freeze=freeze, padded=padded)


def freeze_encoder(model: PreTrainedModel) -> None:
    """What scripts do for feature extraction: no gradient; the encoder stays in train mode."""
    model.bert.requires_grad_(False)


def freeze_encoder_in_eval(model: PreTrainedModel) -> None:
    """With care: no dropout either, whatever `model.train()` says."""
    model.bert.requires_grad_(False).eval()
    model.bert.train = lambda mode=True: model.bert


def freeze_bottom(layers: int, model: PreTrainedModel) -> None:
    """Embeddings and the first layers."""
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:layers].requires_grad_(False)


def batches(data: Dataset, tokenizer: Any, size: int = 64) -> list[tuple[Any, torch.Tensor]]:
    """(inputs, labels), by length, padded to the longest of each."""
    rows = sorted(zip(data["text"], data["label"], strict=True), key=lambda row: len(row[0]))
    found = []
    for start in range(0, len(rows), size):
        texts, labels = zip(*rows[start : start + size], strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        found.append((inputs, torch.tensor(labels)))
    return found


def accuracy(model: PreTrainedModel, tokenizer: Any, held_out: Dataset) -> float:
    model.eval()
    return trainers.accuracy(lambda inputs: model(**inputs).logits, batches(held_out, tokenizer))
