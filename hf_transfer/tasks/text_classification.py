"""Text classification: one text or a pair, a tokenizer, any encoder or decoder with a sequence-classification head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, PreTrainedConfig

from ..config import DataArguments, ModelArguments
from ..data.load import LABELS
from ..errors import UserError, nearest, one_line
from ..models import Labels, Loaded, load_config, load_model, source
from .base import Task

# GLUE's and the hub's usual names, tried before "the only text column".
_USUAL = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
)


_UNBOUNDED = 10**9  # a tokenizer without a limit says 1e30
_DEFAULT_LENGTH = 512


class TextClassification(Task):
    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    input_key = "text_column_name"

    def input_columns(self, features: Mapping[str, Any], args: DataArguments) -> tuple[str, ...]:
        if args.text_column_name:
            given = [args.text_column_name] if isinstance(args.text_column_name, str) else args.text_column_name
            for column in given:
                if column not in features:
                    raise UserError(
                        f"text_column_name: there is no column {column!r}.",
                        f"There are {', '.join(features)}.{nearest(column, features)}",
                    )
            if len(given) > 2:
                raise UserError(f"text_column_name: {', '.join(given)} are {len(given)} columns; give one, or a pair.")
            return tuple(given)
        texts = [n for n, f in features.items() if isinstance(f, Value) and f.dtype in ("string", "large_string")]
        for usual in _USUAL:
            if all(n in texts for n in usual):
                return usual
        texts = [n for n in texts if n not in ("label", LABELS, args.label_column_name)]
        if len(texts) > 1 and (args.task == self.name):
            raise UserError(
                "text_column_name: several columns hold text.", f"Name one, or a pair, of {', '.join(texts)}."
            )
        return tuple(texts) if len(texts) == 1 else ()

    def load(self, model_args: ModelArguments, data_args: DataArguments, labels: Labels) -> tuple[Loaded, Any]:
        config = load_config(model_args, AutoModelForSequenceClassification)
        tokenizer = _load_tokenizer(model_args)
        if config.pad_token_id is None:  # decoders: the last token that is not padding carries the class
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            config.pad_token_id = tokenizer.pad_token_id
        limit = data_args.max_seq_length or _readable(tokenizer, config)
        if limit > _readable(tokenizer, config):
            raise UserError(f"max_seq_length: the model reads {_readable(tokenizer, config)} tokens, not {limit}.")
        tokenizer.model_max_length = limit
        return load_model(model_args, AutoModelForSequenceClassification, config, labels), tokenizer

    def prepare(self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments) -> Dataset:
        for column in inputs:
            if split.features[column].dtype not in ("string", "large_string"):
                raise UserError(f"text_column_name: {column!r} holds {split.features[column].dtype}, not text.")
            empty = [i for i, text in enumerate(split[column]) if text is None]
            if empty:
                raise UserError(
                    f"{len(empty)} examples have no text in column {column!r}, the first is row {empty[0]}."
                )

        return split.map(
            lambda batch: self.encode([batch[c] for c in inputs], processor),
            batched=True,
            remove_columns=[c for c in split.column_names if c != LABELS],
        )

    def read(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not a text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it is not valid Unicode") from error
        return value

    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> Any:
        return processor(*(list(column) for column in columns), truncation=True)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return DataCollatorWithPadding(processor)


def _load_tokenizer(args: ModelArguments) -> Any:
    place, options = source(args)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: {args.model_name_or_path!r} has no tokenizer that can be loaded ({one_line(error)})."
        ) from error


def _readable(tokenizer: Any, config: PreTrainedConfig) -> int:
    """How many tokens model and tokenizer can take; RoBERTa's positions start behind the padding index."""
    positions = getattr(config, "max_position_embeddings", None) or _UNBOUNDED
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2
    limit = min(tokenizer.model_max_length, positions)
    return _DEFAULT_LENGTH if limit >= _UNBOUNDED else limit
