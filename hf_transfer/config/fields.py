"""A key is declared once: a dataclass field with everything that the program knows about it."""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from hf_transfer.errors import nearest

HEAD = "head"
# What a resumed run makes of another value than the checkpoint's: fixed: refuses it; plan: refuses it without
# `allow_changed_plan`; free: takes it.
Resume = Literal["fixed", "plan", "free"]
_SETTING = "setting"


@dataclass(frozen=True)
class Setting:
    """What is known about a key beyond its type and default.

    Attributes:
        help: what `--help` says, with the unit.
        resume: what a resumed run makes of another value; None: nothing was said.
        choices: the values it may have; empty: any.
        minimum, above, maximum, below: bounds, the first of each pair inclusive. Numbers are finite where one is given.
        used_by: strategies or adapters that read it; empty: all.
        topic: heading it stands under in `--help`; empty: its class's.
        card: whether the model card shows it: always, or (changed) where it is not the default.
        auto: the number that stands for "auto", of a key that holds numbers only; None: the word is no value.
    """

    help: str = ""
    resume: Resume | None = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    used_by: tuple[str, ...] = ()
    topic: str = ""
    card: Literal["always", "changed", "never"] = "never"
    auto: int | None = None

    @property
    def range(self) -> str:
        """The bounds in words; empty without any."""
        if self.above == 0 and self.maximum is None and self.below is None:
            return "a positive number"
        bounds = (("at least", self.minimum), ("above", self.above), ("at most", self.maximum), ("below", self.below))
        said = [f"{word} {bound:.10g}" for word, bound in bounds if bound is not None]
        return f"a number {' and '.join(said)}" if said else ""

    def holds(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )


class _Metadata(dict[str, Any]):
    """transformers' `HfArgumentParser` passes a field's metadata to argparse, which takes help and choices only.

    Newer releases read the keys, older ones copy the mapping.
    """

    def keys(self) -> Any:
        return [name for name in self if name != _SETTING]

    def copy(self) -> dict[str, Any]:
        return {name: value for name, value in self.items() if name != _SETTING}


def setting(default: Any, help: str, **known: Any) -> Any:
    """A dataclass field that is a key; `known` are attributes of `Setting`, and `resume` must be one of them."""
    about = Setting(help, **known)
    # argparse: empty means "no value"; and it would compare a parsed truth value with the words.
    has_choices = about.choices and not isinstance(default, bool)
    shown = {"help": help, **({"choices": about.choices} if has_choices else {})}
    return field(default=default, metadata=_Metadata({**shown, _SETTING: about}))


def settings_of(cls: type) -> dict[str, Setting]:
    """What the class's own keys are declared to be, by name; inherited fields without a declaration are left out."""
    return {f.name: f.metadata[_SETTING] for f in fields(cls) if _SETTING in f.metadata}


@dataclass(frozen=True)
class Key:
    """One key: its name, type, default, and what is known about it; `topic` is the heading in a list of keys."""

    name: str
    topic: str
    hint: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    about: Setting = Setting()

    @property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of a union, without their parameters."""
        return tuple(typing.get_origin(t) or t for t in alternatives(self.hint))


def keys_of(cls: type, topic: str) -> dict[str, Key]:
    """The keys that a dataclass's fields are."""
    hints, declared = typing.get_type_hints(cls), settings_of(cls)
    keys = {}
    for f in fields(cls):
        if f.init:
            about = declared.get(f.name, Setting(help=f.metadata.get("help", "")))
            default = f.default_factory() if callable(f.default_factory) else f.default
            choices = about.choices or tuple(f.metadata.get("choices", ())) or enum_values(hints[f.name])
            value = None if default is MISSING else default
            keys[f.name] = Key(f.name, about.topic or topic, hints[f.name], value, about.help, choices, about)
    return keys


def enum_values(hint: Any) -> tuple[str, ...]:
    """The values of the enumerations in a type, as texts."""
    enums = (t for t in alternatives(hint) if isinstance(t, type) and issubclass(t, enum.Enum))
    return tuple(str(e.value) for t in enums for e in t)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a tuple of one for any other type."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def wrong_values(values: Mapping[str, Any], declared: Mapping[str, Setting]) -> Iterator[str]:
    """A sentence for each value that is out of its bounds or not among its choices; None is no value."""
    for name, about in declared.items():
        value = values.get(name)
        if value is None:
            continue
        if about.choices and isinstance(value, str) and value not in about.choices:
            yield f"{name}: {value!r} is not one of {', '.join(about.choices)}.{nearest(value, about.choices)}"
        if about.range and isinstance(value, int | float) and not isinstance(value, bool) and not about.holds(value):
            yield f"{name}: expected {about.range}, got {value:.10g}."


def wrong_kinds(values: Mapping[str, Any], cls: type) -> Iterator[str]:
    """A sentence for each value of a declared field that is a list, a mapping or neither where another is expected.

    Values of files and commands have their type; from Python anything may come.
    """
    declared = settings_of(cls)
    for key in keys_of(cls, "").values():
        value = values.get(key.name)
        if key.name not in declared or value is None or Any in key.types:
            continue
        kinds = [said for kind, said in ((list, "a list"), (dict, "a mapping")) if kind in key.types]
        is_list, is_mapping = isinstance(value, list | tuple), isinstance(value, Mapping)
        if is_list or is_mapping:
            wrong = ("a list" if is_list else "a mapping") not in kinds
        else:
            wrong = bool(kinds) and not any(kind in key.types for kind in (str, bool, int, float))
        if wrong:
            yield f"{key.name}: expected {' or '.join(kinds) or 'one value'}, got {value!r}."


def unused(
    values: Mapping[str, Any], defaults: Mapping[str, Any], declared: Mapping[str, Setting], chosen: str | None
) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(name, what reads it) of each key that has a value of its own, which nothing reads where `chosen` is chosen."""
    return (
        (name, about.used_by)
        for name, about in declared.items()
        if about.used_by and values[name] != defaults[name] and chosen not in about.used_by
    )
