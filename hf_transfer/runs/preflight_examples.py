"""Preflight: the real examples that a run is tried on, and whether the model has a row for each of their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
from torch import nn

from hf_transfer.adapters.attach import spare_tokens
from hf_transfer.data.bucketing import chunks, list_lengths
from hf_transfer.errors import UserError
from hf_transfer.features.batches import Batch
from hf_transfer.features.examples import TRAINING, VALIDATION, Source
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer

_TOKENS, _SEGMENTS = "input_ids", "token_type_ids"
_POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")


@dataclass(frozen=True)
class Examples:
    """A split, as the trainer's loaders read it.

    Attributes:
        name: train, validation or test.
        prepared: the run's data.
        trainer: makes the batches.
        source: the split, prepared for the model.
        raw: the model inputs as they are stored, before random changes.
        lengths: tokens of each text, (examples,); None for images.
    """

    name: str
    prepared: Prepared
    trainer: TransferTrainer
    source: Source
    raw: Any
    lengths: np.ndarray[Any, Any] | None

    @classmethod
    def of(cls, name: str, prepared: Prepared, trainer: TransferTrainer, split: Any) -> Examples:
        source = Source.of(trainer, TRAINING if name == "train" else VALIDATION, split)
        raw = source.dataset.with_format(None)
        lengths = list_lengths(raw, _TOKENS) if _TOKENS in raw.column_names else None
        return cls(name, prepared, trainer, source, raw, lengths)

    def __len__(self) -> int:
        return len(self.source.dataset)

    @property
    def extremes(self) -> list[int]:
        """Numbers of the longest and the shortest text; of the first two examples if all are of one length."""
        if self.lengths is None or self.lengths.min() == self.lengths.max():
            return list(range(min(2, len(self))))
        return [int(self.lengths.argmax()), int(self.lengths.argmin())]

    def first(self, count: int) -> list[int]:
        """Numbers of `count` examples, the longest and the shortest among them."""
        wanted = dict.fromkeys((*self.extremes, *range(min(count, len(self)))))
        return list(wanted)[:count]

    def longest(self, count: int) -> list[int]:
        """Numbers of the `count` longest texts, or of as many images."""
        if self.lengths is None:
            return list(range(min(count, len(self))))
        return [int(number) for number in np.argsort(-self.lengths, kind="stable")[:count]]

    def batch(self, numbers: Sequence[int], alone: bool = False) -> Batch:
        """These examples as a batch on the model's device; `alone`: as an evaluation takes them, without a target's."""
        return self.trainer.boundary.sources.load(self.source, list(numbers), alone)

    def describe(self, number: int) -> str:
        """How to find an example: `validation, row 3 ('a text'), 17 tokens`."""
        tokens = "" if self.lengths is None else f", {int(self.lengths[number])} tokens"
        if number >= len(self.prepared.data.splits[self.name]):
            return f"a labeled example of the target{tokens}"
        return f"{self.name}, {self.prepared.data.name_of(self.name, number)}{tokens}"


def examples_of(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]) -> dict[str, Examples]:
    """The splits by name; of a stream the examples that were read in advance."""
    if prepared.config.data.streaming:
        data, keys = prepared.data, prepared.config.data
        read = prepared.task.prepare_training(data.train, data.inputs, prepared.processor, keys, prepared.chance)
        splits = {**splits, "train": read}
    return {name: Examples.of(name, prepared, trainer, split) for name, split in splits.items()}


def check_tokens(splits: Sequence[Examples]) -> None:
    """Check that the model has an embedding for each token, segment and position in the splits.

    On a GPU, an index beyond a table ends the process with an error that names neither.

    Raises:
        UserError: the tokenizer knows more tokens than the model, or a text is longer than the model can read.
    """
    model = splits[0].trainer.model
    rows = {_TOKENS: _rows(_input_embeddings(model)), _SEGMENTS: _rows(_named(model, "token_type_embeddings"))}
    limit = _position_limit(model, splits[0].prepared)
    for split in splits:
        if split.lengths is None:
            continue
        for column, limit_of_column in rows.items():
            if limit_of_column is not None and column in split.raw.column_names:
                _check_column(split, column, limit_of_column)
        longest = split.extremes[0]
        if limit is not None and split.lengths[longest] > limit:
            raise UserError(
                f"the model has positions for {limit} tokens, and a text is longer: {split.describe(longest)}.",
                f"Set max_seq_length: {limit}.",
                key="max_seq_length",
            )


def _check_column(split: Examples, column: str, rows: int) -> None:
    """Check the ids of a column; also the padding token's, where batches are padded."""
    start = 0
    for chunk in chunks(split.raw, column):
        values = chunk.flatten()
        bounds = pyarrow.compute.min_max(values).as_py()
        if bounds["max"] is not None and not 0 <= bounds["min"] <= bounds["max"] < rows:
            for offset, ids in enumerate(chunk):
                wrong = [i for i in ids.as_py() if not 0 <= i < rows]
                if wrong:
                    raise _no_row(split, start + offset, column, wrong[0], rows)
        start += len(chunk)
    assert split.lengths is not None
    padding = getattr(split.prepared.processor, "pad_token_id", None)
    if column == _TOKENS and padding is not None and padding >= rows and len(set(split.lengths.tolist())) > 1:
        raise _no_row(split, int(split.lengths.argmin()), column, padding, rows, " for padding")


def _no_row(split: Examples, number: int, column: str, index: int, rows: int, use: str = "") -> UserError:
    where = split.describe(number)
    if column == _SEGMENTS:
        problem = f"the tokenizer numbers segments up to {index}, and the model has {rows} of them ({where})."
        return UserError(problem, "Use the tokenizer that the model was trained with.", key="model_name_or_path")
    token = split.prepared.processor.convert_ids_to_tokens(index)
    return UserError(
        f"the tokenizer's token {token!r}{use} has the number {index}, and the model has embeddings for {rows} tokens "
        f"only, numbered from 0 ({where}).",
        "Use the tokenizer that the model was trained with, or give the model embeddings for the added tokens: "
        "`model.resize_token_embeddings(len(tokenizer))`, then save both in one folder.",
        key="model_name_or_path",
    )


# ---- tables of the model -----------------------------------------------------------------------------------------


def _input_embeddings(model: Any) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for a model that does not say which it is
        return None
    return found if isinstance(found, nn.Module) else None


def _named(model: nn.Module, name: str) -> nn.Module | None:
    return next((m for path, m in _tables(model) if path.rpartition(".")[2] == name), None)


def _tables(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Embedding))


def _rows(table: nn.Module | None) -> int | None:
    """Rows of an embedding, also inside a wrapper of peft's; None for anything else."""
    weight = getattr(table, "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.dim() == 2 else None


def _position_limit(model: nn.Module, prepared: Prepared) -> int | None:
    """Tokens for which the model has positions; None if it has no table of them.

    BART's and OPT's tables have `offset` unused rows, and RoBERTa's positions start after the padding token's.
    """
    limits = [
        table.num_embeddings
        - int(getattr(table, "offset", 0) or (0 if table.padding_idx is None else table.padding_idx + 1))
        for path, table in _tables(model)
        if _POSITIONS.search(path)
    ]
    return min(limits) - spare_tokens(prepared.config.training, model) if limits else None
