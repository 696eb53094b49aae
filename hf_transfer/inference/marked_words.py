"""A text as words with what each adds to an answer, from attributions to its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WITHOUT_SPACES = "\u0e00"  # from here on, most scripts put no space between words


@dataclass(frozen=True)
class Word:
    """A part of a text.

    Attributes:
        text: of the part, with the blanks before it.
        value: what it adds to the log odds of the class that is explained, or to the value of a regression; None of
            what the model did not read.
    """

    text: str
    value: float | None


def words_of(texts: Sequence[str], encoded: Any, values: torch.Tensor, tokenizer: Any) -> tuple[tuple[Word, ...], ...]:
    """The words of one example, for each of its texts.

    A word is what the tokenizer split from its neighbors, without the pieces that it cut it into.

    Args:
        texts: one, or two of a pair.
        encoded: a batch of this one example, as the tokenizer gave it.
        values: (tokens,) attributions.
        tokenizer: that encoded it.
    """
    if not tokenizer.is_fast:  # it does not say where in the text its tokens stand
        tokens = tokenizer.convert_ids_to_tokens(list(encoded["input_ids"][0]))
        special = tokenizer.get_special_tokens_mask(encoded["input_ids"][0], already_has_special_tokens=True)
        shown = [(t, v) for t, v, s in zip(tokens, values.tolist(), special, strict=True) if not s]
        return (tuple(Word(f"{' ' if i else ''}{token}", value) for i, (token, value) in enumerate(shown)),)
    own = encoded.encodings[0]
    found = []
    for number, text in enumerate(texts):
        spans: list[_Span] = []
        for start, end, word, sequence, value in zip(*zip(*own.offsets, strict=True), own.word_ids, own.sequence_ids,
                                                    values.tolist(), strict=True):  # fmt: skip
            if sequence == number and end > start:
                _add(spans, _Span(start, end, word, value), text)
        found.append(tuple(_parts(text, spans)))
    return tuple(found)


@dataclass
class _Span:
    """A word's place in its text."""

    start: int
    end: int
    word: int | None
    value: float


def _add(spans: list[_Span], span: _Span, text: str) -> None:
    """Put a token into the last word, or begin the next one."""
    while span.start < span.end - 1 and text[span.start].isspace():  # some tokenizers count the blank before a word
        span.start += 1
    last = spans[-1] if spans else None
    if last is not None and (span.start < last.end or (span.start == last.end and _joins(last, span, text))):
        last.end, last.value = max(last.end, span.end), last.value + span.value
    else:
        spans.append(span)


def _joins(last: _Span, span: _Span, text: str) -> bool:
    """Whether two tokens that touch are pieces of one word."""
    before, after = text[last.end - 1], text[span.start]
    return last.word == span.word and before.isalnum() and after.isalnum() and max(before, after) < _WITHOUT_SPACES


def _parts(text: str, spans: Sequence[_Span]) -> list[Word]:
    """The whole text: its words, each with the blanks before it, and what the model did not read."""
    parts, place = [], 0
    for span in spans:
        gap = text[place : span.start]
        if gap.strip():
            parts.append(Word(gap, None))
            gap = ""
        parts.append(Word(gap + text[span.start : span.end], span.value))
        place = span.end
    return [*parts, *([Word(text[place:], None)] if text[place:] else [])]
