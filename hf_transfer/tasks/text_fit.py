"""Does a tokenizer fit the texts? Tokens per word and unknown tokens, on a sample.

A checkpoint has learned nothing of words that its tokenizer breaks into letters or does not know. Fertility, the tokens
per word, is what tells the two apart (Rust et al. 2021, "How Good is Your Tokenizer?", section 4). What was measured
with the English tokenizer of `bundled:minilm-l6` stands beside each limit: reviews are far below all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hf_transfer.data.facts import Misfit

SAMPLE = 512  # texts
_CHARACTERS = 2_000  # read of each: enough to see its language
_AT_ONCE = 100  # words that are tokenized together
_LEAST = 20  # words of a sample; of fewer nothing is said

UNKNOWN = 0.05  # fraction of the tokens. Reviews 0.000, tweets with emoji 0.04; Chinese 0.71, Hindi 0.13
PER_WORD = 2.5  # tokens. Reviews 1.1, German 1.9, Spanish 1.8, multilingual models about 2; Russian 4.6, Korean 5.3
PER_CHARACTER = 1.5  # tokens of scripts without spaces. A Chinese vocabulary 1.0; bytes 2 to 3
PER_SPACED = 2.8  # tokens between spaces, punctuation included. Reviews 1.2, tweets 2.5; Python 3.0, JavaScript 4.3

_SYMBOLS = 0.12  # fraction of the characters that are no letters. Prose 0.04 to 0.08; Python 0.17, JavaScript 0.24

# Han, kana, Thai, Lao, Burmese, Khmer: written without spaces, so that a run of letters is no word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003134f"
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u0652\u0900-\u0dff"  # inside words, and no letters to `re`
_WORD = re.compile(rf"(?:(?![{_UNSPACED}])(?:[^\W\d_]|[{_MARKS}]))+")  # a run of letters
_CHARACTER = re.compile(rf"[{_UNSPACED}]")


def misfits(columns: Sequence[Sequence[str]], tokenizer: Any) -> list[Misfit]:
    """What of the texts the tokenizer was not made for; empty if it fits, or the sample is too small to say.

    Args:
        columns: texts of a sample by input column.
        tokenizer: of the checkpoint.
    """
    texts = [text[:_CHARACTERS] for column in columns for text in column if text]
    words = [word for text in texts for word in _WORD.findall(text)]
    characters = [character for text in texts for character in _CHARACTER.findall(text)]
    spaced = [part for text in texts for part in text.split()]
    if not spaced or max(len(words), len(characters), len(spaced)) < _LEAST:
        return []
    of_texts = _tokens(texts, tokenizer)
    unknown = _fraction_unknown(of_texts, tokenizer)
    if unknown > UNKNOWN:
        return [_unknown(unknown)]
    if len(characters) > len(words):  # a Chinese word has about two characters
        ratio = _per_item("", characters, tokenizer)
        return [_broken("tokens per character", ratio, PER_CHARACTER, 1.0)] if ratio > PER_CHARACTER else []
    if len(words) >= _LEAST and (ratio := _per_item(" ", words, tokenizer)) > PER_WORD:
        return [_broken("tokens per word", ratio, PER_WORD, 1.2)]
    ratio, symbols = sum(map(len, of_texts)) / len(spaced), 1 - sum(map(len, words)) / sum(map(len, spaced))
    return [_no_prose(ratio)] if ratio > PER_SPACED and symbols > _SYMBOLS else []


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)[
        "input_ids"
    ]
    return encoded


def _per_item(between: str, items: Sequence[str], tokenizer: Any) -> float:
    """Tokens per word or character, without what else is in the texts."""
    parts = [between.join(items[i : i + _AT_ONCE]) for i in range(0, len(items), _AT_ONCE)]
    return sum(map(len, _tokens(parts, tokenizer))) / len(items)


def _fraction_unknown(tokens: Sequence[Sequence[int]], tokenizer: Any) -> float:
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id == tokenizer.eos_token_id:  # of bytes: never unknown
        return 0.0
    total = sum(map(len, tokens))
    return sum(ids.count(tokenizer.unk_token_id) for ids in map(list, tokens)) / max(1, total)


def _unknown(fraction: float) -> Misfit:
    return Misfit(
        "unknown tokens",
        fraction,
        UNKNOWN,
        f"the tokenizer does not know {fraction:.0%} of the tokens of sampled texts (above {UNKNOWN:.0%} it does not "
        "fit): the model cannot tell them apart. Choose a checkpoint for this language or these symbols, such as a "
        "multilingual one.",
    )


def _broken(measure: str, ratio: float, limit: float, usual: float) -> Misfit:
    return Misfit(
        measure,
        ratio,
        limit,
        f"the tokenizer takes {ratio:.1f} {measure} of sampled texts (of a language that it was made for about "
        f"{usual:g}, above {limit:g} it does not fit): the model has learned little of these words. Choose a "
        "checkpoint for this language, or a multilingual one.",
    )


def _no_prose(ratio: float) -> Misfit:
    return Misfit(
        "tokens between spaces",
        ratio,
        PER_SPACED,
        f"sampled texts have {ratio:.1f} tokens from one space to the next (sentences about 1.2, above "
        f"{PER_SPACED:g} it is no prose): code, numbers or addresses. Choose a checkpoint that was pretrained on such "
        "texts, unless this one was.",
    )
