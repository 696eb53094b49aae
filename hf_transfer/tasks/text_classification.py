"""Text classification: one text or a pair, a tokenizer, any encoder or decoder with a sequence-classification head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset, Image, Value
from datasets.fingerprint import Hasher
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_transfer import __version__
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.augment import EXAMPLE, Chance, mask_tokens
from hf_transfer.data.columns import several_texts, text_candidates
from hf_transfer.data.duplicates import Trace, content_hash, normalized
from hf_transfer.data.facts import Misfit
from hf_transfer.data.header import check_column
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError, one_line
from hf_transfer.evaluation.corruptions import TEXTS
from hf_transfer.models.load import Loaded, load_config, load_model
from hf_transfer.models.source import processor_source
from hf_transfer.tasks import text_fit
from hf_transfer.tasks.base import Task, spread
from hf_transfer.tasks.tokenizer_digest import digest
from hf_transfer.tasks.tokenizer_fit import check_tokenizer, grow_embeddings, max_tokens, settle

# Usual column names of GLUE and other hub datasets, tried before "the only text column"; pairs before their parts.
_USUAL = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "answer"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("title", "text"),
    ("text",),
    ("sentence",),
)
_CHARACTERS = 100  # characters read per token at most: tokenizing 10 MB only to truncate it would take minutes


class TextClassification(Task):
    """Text classification: one text column or a pair, a tokenizer, and a Hugging Face model."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    input_key = "text_column_name"
    pads = True
    corruptions = TEXTS

    def input_columns(self, features: Mapping[str, Any], args: DataArguments) -> tuple[str, ...]:
        if args.text_column_name:
            given = [args.text_column_name] if isinstance(args.text_column_name, str) else args.text_column_name
            for column in given:
                check_column(column, features, "text_column_name")
                kind = getattr(features[column], "dtype", "lists")
                if kind not in ("string", "large_string"):
                    raise UserError(f"text_column_name: column {column!r} contains {kind}, not text.")
            if len(given) > 2:
                raise UserError(
                    f"text_column_name: expected one column or a pair, got {len(given)}: {', '.join(given)}."
                )
            return tuple(given)
        labels = args.label_column_name if isinstance(args.label_column_name, list) else [args.label_column_name]
        strings = [n for n, f in features.items() if isinstance(f, Value) and f.dtype in ("string", "large_string")]
        for usual in _USUAL:
            if all(n in strings and n not in labels for n in usual):
                return usual
        texts = text_candidates(features, ("label", LABELS, args.split_group_column_name, *labels))
        if len(texts) > 1 and not any(isinstance(f, Image) for f in features.values()):
            raise several_texts(features, texts)
        return tuple(texts) if len(texts) == 1 else ()

    def load(self, model_args: ModelArguments, data_args: DataArguments, labels: Labels) -> tuple[Loaded, Any]:
        config = load_config(model_args, AutoModelForSequenceClassification)
        tokenizer = _load_tokenizer(model_args)
        vocabulary = tokenizer.get_vocab()
        notes = check_tokenizer(tokenizer, vocabulary, str(model_args.model_name_or_path))
        if not 0 <= (-1 if config.pad_token_id is None else config.pad_token_id) < len(tokenizer):
            config.pad_token_id = tokenizer.pad_token_id
        loaded = load_model(model_args, AutoModelForSequenceClassification, config, labels)
        longest = max_tokens(loaded.model, tokenizer)
        limit = data_args.max_seq_length or longest
        if limit > longest:
            raise UserError(f"max_seq_length: {limit} exceeds the model's maximum of {longest} tokens.")
        tokenizer.model_max_length = limit
        if data_args.truncation_side:
            tokenizer.truncation_side = data_args.truncation_side
        grown = grow_embeddings(loaded.model, vocabulary)
        if grown:
            notes.append(
                f"Added {grown} embeddings for tokens beyond the checkpoint's: each starts as the mean of all."
            )
        notes += settle(loaded.model, tokenizer, vocabulary)
        return replace(loaded, notes=(*loaded.notes, *notes), grown=grown), tokenizer

    def saved_processor(self, model_args: ModelArguments, data_args: DataArguments) -> tuple[Any, Any]:
        tokenizer = _load_tokenizer(model_args)
        if data_args.truncation_side:
            tokenizer.truncation_side = data_args.truncation_side
        return load_config(model_args, AutoModelForSequenceClassification), tokenizer

    def prepare(self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments) -> Dataset:
        rows = zip(*(split[column][:] for column in inputs), strict=True)
        if empty := [i for i, values in enumerate(rows) if self.wrong(values)]:
            row = split[ROW][empty[0]] if ROW in split.column_names else empty[0]
            raise UserError(
                f"{len(empty):,} examples have no text in {' and '.join(map(repr, inputs))} (first: row {row}).",
                "Fix or remove them, or set on_bad_example: skip to leave them out.",
            )
        return self._tokenized(split, inputs, processor, (LABELS,))

    def _tokenized(self, split: Dataset, inputs: tuple[str, ...], processor: Any, kept: Sequence[str]) -> Dataset:
        return split.map(
            lambda batch: self.encode([batch[c] for c in inputs], processor),
            batched=True,
            remove_columns=[c for c in split.column_names if c not in kept],
            new_fingerprint=digest(processor, Hasher.hash(self), __version__, split._fingerprint, inputs, kept),
        )

    def prepare_training(
        self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Dataset:
        mask = _masking(processor, args, chance)
        if mask is None:
            return self.prepare(split, inputs, processor, args)
        return self._tokenized(split, inputs, processor, (LABELS, EXAMPLE)).with_transform(mask)

    def change(
        self, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        plain, mask = super().change(inputs, processor, args, chance), _masking(processor, args, chance)
        return plain if mask is None else partial(_both, plain, mask)

    def read(self, value: Any) -> str:
        if value is None:
            raise ValueError("no text")
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("not valid Unicode") from error
        return value

    def wrong(self, values: Sequence[Any]) -> str:
        is_empty = any(text is None for text in values) or not any(text.strip() for text in values)
        return "empty text" if is_empty else ""

    def trace(self, values: Sequence[Any]) -> Trace:
        if reason := self.wrong(values):
            raise ValueError(reason)
        near = content_hash(*(normalized(text).encode() for text in values))
        sizes = {"characters": sum(len(text) for text in values)}
        return Trace(content_hash(*(text.encode() for text in values)), near, sizes)

    def cut(self, sample: Dataset, inputs: tuple[str, ...], processor: Any) -> tuple[float, int]:
        limit = processor.model_max_length
        columns = [[readable_part(text, processor) for text in sample[c]] for c in inputs]
        lengths = [len(ids) for ids in processor(*columns, verbose=False)["input_ids"]]
        return sum(length > limit for length in lengths) / max(1, len(lengths)), limit

    def misfits(self, split: Dataset, inputs: tuple[str, ...], model: Any, processor: Any) -> list[Misfit]:
        sample = spread(split, text_fit.SAMPLE)
        return text_fit.misfits([sample[c][:] for c in inputs], processor)

    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> Any:
        return processor(*([readable_part(text, processor) for text in c] for c in columns), truncation=True)

    def look(
        self, columns: Sequence[Sequence[Any]], processor: Any, views: Views, args: DataArguments
    ) -> tuple[Mapping[str, Any], list[int]]:
        if views.tta > 1:
            raise UserError("tta: only applies to images, and the model reads text.", "Use stride for long texts.")
        if views.stride is None:
            return super().look(columns, processor, views, args)
        return windows(columns, processor, views.stride)

    def preprocessing(self, processor: Any) -> dict[str, Any]:
        names = ("model_max_length", "truncation_side", "padding_side", "pad_token_id", "model_input_names")
        return {"tokenizer": type(processor).__name__, **{name: getattr(processor, name) for name in names}}

    def made_up(self, processor: Any, count: int) -> list[tuple[Any, ...]]:
        words = sorted(word for word in processor.get_vocab() if word.isalpha())
        step = max(1, len(words) // 97)
        rows = (words[i % step :: step][: 1 + 7 * i % 40] for i in range(count))
        return [(" ".join(row) or "a",) for row in rows]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return DataCollatorWithPadding(processor)


def _load_tokenizer(args: ModelArguments) -> Any:
    place, options = processor_source(args)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load a tokenizer from {args.model_name_or_path!r} ({one_line(error)}).", key="model_name_or_path"
        ) from error


def _masking(tokenizer: Any, args: DataArguments, chance: Chance) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """The function that masks tokens of tokenized rows; None without `token_masking`.

    Raises:
        UserError: the tokenizer has no mask token.
    """
    if not args.token_masking:
        return None
    if tokenizer.mask_token_id is None:
        raise UserError("token_masking: the tokenizer has no mask token.", "Remove token_masking.")
    return partial(_masked, args.token_masking, tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids), chance)


def _masked(share: float, mask: int, special: frozenset[int], chance: Chance, batch: dict[str, Any]) -> dict[str, Any]:
    masked = []
    for ids, example in zip(batch["input_ids"], batch[EXAMPLE], strict=True):
        with chance.of(example):
            masked.append(mask_tokens(ids, share, mask, special))
    return {k: v for k, v in batch.items() if k != EXAMPLE} | {"input_ids": masked}


def _both(plain: Any, mask: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return mask({**plain(batch), EXAMPLE: batch[EXAMPLE]})


def windows(columns: Sequence[Sequence[str]], tokenizer: Any, stride: int) -> tuple[dict[str, list[Any]], list[int]]:
    """Split long texts into overlapping windows.

    In a pair, the longer text is split and each window is paired with the whole shorter text. If that one takes more
    than half of the maximum length, both are truncated as in training.

    Args:
        columns: texts, or the first and the second texts of pairs.
        tokenizer: a fast tokenizer.
        stride: overlap of consecutive windows in tokens.

    Returns:
        The tokenized windows, and for each window the index of its example.

    Raises:
        UserError: `stride` is not smaller than a window, or the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"stride: requires a fast tokenizer, and {type(tokenizer).__name__} is not one.", "Remove stride."
        )
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    least = room if len(columns) == 1 else (room + 1) // 2
    if stride >= least:
        raise UserError(f"stride: windows of {least} tokens cannot overlap by {stride}.", f"Use at most {least - 1}.")
    sides = ["longest_first"] * len(columns[0])
    if len(columns) > 1:
        lengths = [
            [len(ids) for ids in tokenizer(list(c), add_special_tokens=False, verbose=False)["input_ids"]]
            for c in columns
        ]
        for i, (first, second) in enumerate(zip(*lengths, strict=True)):
            fits = min(first, second) <= room - least
            sides[i] = ("only_first" if first >= second else "only_second") if fits else "cut"
    encoded: dict[str, list[Any]] = {}
    owners: list[int] = []
    for i, (side, *texts) in enumerate(zip(sides, *columns, strict=True)):
        split = {"truncation": side, "stride": stride, "return_overflowing_tokens": True}
        rows = tokenizer(*([text] for text in texts), **(split if side != "cut" else {"truncation": True}))
        owners += [i] * len(rows["input_ids"])
        for name in set(rows) - {"overflow_to_sample_mapping"}:
            encoded.setdefault(name, []).extend(rows[name])
    return encoded, owners


def readable_part(text: str, tokenizer: Any) -> str:
    """The part of a text that can fit into the maximum length, from the end that truncation keeps."""
    most = tokenizer.model_max_length * _CHARACTERS
    return text[-most:] if tokenizer.truncation_side == "left" else text[:most]
