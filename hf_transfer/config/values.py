"""What a key is, and how its value is read: YAML, text from a command line or a Python value, all through `coerce`.

Not `HfArgumentParser`: it stops at the first problem, takes abbreviations, and gives YAML's `1e-3` as a string.
"""

from __future__ import annotations

import enum
import numbers
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_transfer.config.fields import Key, alternatives
from hf_transfer.errors import UserError, nearest, one_line


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number and only true and false are booleans (`eval_strategy: no` is a word)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in ("float", "bool", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load_yaml(text: str) -> Any:
    """YAML as the keys read it."""
    return yaml.load(text, Loader=_Loader)


def read_config_file(path: str) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        UserError: the file cannot be read, or is not a flat mapping.
    """
    try:
        values = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: {path!r} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError) as error:  # also what is no text, and dates that are none
        raise UserError(f"--config: {path!r} is not YAML ({one_line(error)}).") from error
    if not isinstance(values, dict):
        raise UserError(f"--config: {path!r} is not a mapping of keys to values.")
    return {str(k): v for k, v in values.items()}


def coerce(value: Any, key: Key) -> Any:
    """`value` (a Python value, or text from a command line) as `key`'s type.

    Raises:
        ValueError: with a sentence that says what was expected.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value == "auto" and key.about.auto is not None:
        value = key.about.auto
    if isinstance(value, str):
        value = _read_text(value, key)
    if isinstance(value, str) and list in key.types and "," in value:
        value = _split(value, key)
    if isinstance(value, str) and str not in key.types and list[str] in alternatives(key.hint):
        value = [value]  # a list of texts may be one
    if value is None and (types.NoneType in key.types or key.default is None):
        return None
    for wanted, convert in _CONVERSIONS.items():
        if wanted in key.types and (converted := convert(value)) is not None:
            if wanted is str and key.choices and converted not in key.choices:
                raise ValueError(
                    f"{converted!r} is not one of {', '.join(key.choices)}.{nearest(converted, key.choices)}"
                )
            return converted
    word = "" if key.about.auto is None else " or auto"
    raise ValueError(f"{value!r} is not {_expected(key.types)}{word}.")


def _read_text(text: str, key: Key) -> Any:
    """Text as YAML flow where the key is not a text; a word where it may be true or false."""
    if bool in key.types and (str not in key.types or "true" in key.choices) and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    flow = text.lstrip()[:1] in ("[", "{") and {list, dict} & set(key.types)
    if str in key.types and not flow and text != "null":
        return _read_number(text) if {int, float} & set(key.types) else text
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        if flow:
            raise ValueError(f"{text!r} is not YAML ({one_line(error)}).") from None
        return text


def _read_number(text: str) -> Any:
    """Text as a number if it is one."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    return value if _is_number(value) else text


def _split(text: str, key: Key) -> list[Any] | str:
    """`a,b,c` as a list, where all are plain words or numbers: a pattern or a sentence with commas stays one text."""
    words = [word.strip() for word in text.split(",")]
    if not all(_PLAIN.fullmatch(word) for word in words):
        return text
    is_text = list[str] in alternatives(key.hint)
    return words if is_text else [load_yaml(word) for word in words]


_PLAIN = re.compile(r"[\w.*/:@+-]+")
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# In order: the first that a key allows and that takes the value. None says no.
_CONVERSIONS: dict[type, Callable[[Any], Any]] = {
    bool: lambda v: v if isinstance(v, bool) else None,
    int: lambda v: int(v) if _is_number(v) and v == v // 1 else None,
    float: lambda v: float(v) if _is_number(v) else None,
    list: lambda v: list(v) if isinstance(v, list | tuple) else None,
    dict: lambda v: dict(v) if isinstance(v, Mapping) else None,
    str: lambda v: str(v) if isinstance(v, str | Path) or _is_number(v) else None,
}


def _expected(wanted: Sequence[Any]) -> str:
    return " or ".join(text for kind, text in _NAMES.items() if kind in wanted) or "of a type that can be given here"
