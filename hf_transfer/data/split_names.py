"""Names of splits, as data uses them for splits, files and folders."""

from __future__ import annotations

import re
from collections.abc import Iterable

SPLITS = ("train", "validation", "test")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval", "evaluation")
# Words that say nothing in the name of a folder: `train_images`, `test_set`, `validation2017`.
_FILLERS = (
    "data dataset file files folder image images img imgs jpg photo photos pic pics picture pictures png set sets"
)
FILLERS = frozenset((*_FILLERS.split(), "split"))


def standard_name(split: str) -> str:
    """`train`, `validation` or `test` for their usual aliases; other names unchanged."""
    return "validation" if split in VALIDATION_NAMES else {"training": "train", "testing": "test"}.get(split, split)


def split_roles(names: Iterable[str]) -> dict[str, str]:
    """Name → split of the folders next to each other that are named after one.

    A name says its split alone or with words that say nothing (`test_set`, `train2017`). With other words
    (`birds_train`) it does so only next to names with the same words for the training set and another split:
    `test_tube` is a class.
    """
    named = {name: parsed for name in names if (parsed := _parse(name))}
    by_words: dict[tuple[str, ...], set[str]] = {}
    for split, words in named.values():
        by_words.setdefault(words, set()).add(split)
    return {
        name: split
        for name, (split, words) in named.items()
        if not words or ("train" in by_words[words] and len(by_words[words]) > 1)
    }


def split_words(name: str) -> dict[str, str]:
    """The words of a name that mean a split, such as `training`, each with that split; `trainset` is `train`."""
    return {stem: split for word in _words(name) if (stem := _stem(word)) and (split := _split_of(stem))}


def _parse(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(the split that occurs in a name, the other words of it); None if none occurs, or several."""
    splits = set(split_words(name).values())
    rest = tuple(word for word in _words(name) if not _stem(word) and word not in FILLERS)
    return (next(iter(splits)), rest) if len(splits) == 1 else None


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+", name)]


def _stem(word: str) -> str:
    """The part of a word such as `trainset` that means a split, or an empty string."""
    stems = (word, *(word.removesuffix(filler) for filler in FILLERS if word.endswith(filler)))
    return next((stem for stem in stems if _split_of(stem)), "")


def _split_of(stem: str) -> str:
    name = "train" if stem == "trainval" else standard_name(stem)
    return name if name in SPLITS else ""
