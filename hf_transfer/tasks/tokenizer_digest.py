"""What a tokenizer's answers depend on, in few bytes: `datasets` names the tokenized splits that it keeps by this.

Left to itself, `Dataset.map` pickles the tokenizer in Python, each of its tokens by itself, for every split: a tenth of
a second for 30,000 tokens.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What calls leave behind, which no answer depends on.
_LEFT_BEHIND = ("cache", "deprecation_warnings")


def digest(tokenizer: Any, *more: Any) -> str | None:
    """Hexadecimal SHA-256 of everything that a tokenizer holds, and of the `repr` of more values.

    None if the tokenizer cannot be pickled. Truncation and padding of a fast tokenizer are set by each call, and do
    not count.
    """
    state = {name: value for name, value in vars(tokenizer).items() if name not in _LEFT_BEHIND}
    with _uncalled(state.get("_tokenizer")):
        try:
            content = pickle.dumps((type(tokenizer), state))
        except (pickle.PicklingError, TypeError, AttributeError):
            return None
    return hashlib.sha256(content + repr(more).encode()).hexdigest()


@contextmanager
def _uncalled(backend: Any) -> Iterator[None]:
    """Context in which the Rust part of a tokenizer, if it has one, neither truncates nor pads."""
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    if truncation is not None:
        backend.no_truncation()
    if padding is not None:
        backend.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
