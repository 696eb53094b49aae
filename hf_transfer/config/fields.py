"""A key: its dataclass field, and what is read from it."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Key:
    """One key: its type, default and help; `topic` is the heading it stands under in a list of keys."""

    name: str
    topic: str
    hint: Any
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of a union, without their parameters."""
        return tuple(typing.get_origin(t) or t for t in alternatives(self.hint))


def keys_of(cls: type, topic: str) -> dict[str, Key]:
    """The keys that a dataclass's fields are."""
    hints = typing.get_type_hints(cls)
    found = {}
    for f in fields(cls):
        if f.init:
            default = f.default_factory() if callable(f.default_factory) else f.default
            choices = tuple(f.metadata.get("choices", ())) or enum_values(hints[f.name])
            doc = f.metadata.get("help", "")
            found[f.name] = Key(f.name, topic, hints[f.name], None if default is MISSING else default, doc, choices)
    return found


def enum_values(hint: Any) -> tuple[str, ...]:
    """The values of the enumerations in a type, as texts."""
    enums = (t for t in alternatives(hint) if isinstance(t, type) and issubclass(t, enum.Enum))
    return tuple(str(e.value) for t in enums for e in t)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a tuple of one for any other type."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


HEAD = "head"


def key(default: Any, doc: str, choices: Sequence[str] = ()) -> Any:
    """A dataclass field that is a key: its default, what `--help` says, and the values it may have."""
    # HfArgumentParser hands the metadata to argparse, which takes empty choices for "no value is right".
    return field(default=default, metadata={"help": doc, **({"choices": tuple(choices)} if choices else {})})
