"""What a key is, and how its value is read: YAML, text from a command line or a Python value, all through `coerce`.

Not `HfArgumentParser`: it stops at the first problem, takes abbreviations, and gives YAML's `1e-3` as a string.
"""

from __future__ import annotations

import argparse
import enum
import numbers
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, nearest, one_line


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
    if isinstance(value, str):
        value = _read_text(value, key)
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
    raise ValueError(f"{value!r} is not {_expected(key.types)}.")


def _read_text(text: str, key: Key) -> Any:
    """Text as YAML flow where the key is not a text; a word where it may be true or false."""
    if bool in key.types and str not in key.types and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    flow = text.lstrip()[:1] in ("[", "{") and {list, dict} & set(key.types)
    if str in key.types and not flow and text != "null":
        return text
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        if flow:
            raise ValueError(f"{text!r} is not YAML ({one_line(error)}).") from None
        return text


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


# ---- the command line ----------------------------------------------------------------------------------------------


class _Help(argparse.HelpFormatter):
    """`--key VALUE`, although a key may take several words or none."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 34, **options})

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return action.metavar if isinstance(action.metavar, str) else ""


def add_keys(parser: argparse.ArgumentParser, keys: Mapping[str, Key], flags: bool = False) -> None:
    """Make every key an option of `parser`, under its topic, with its values and default in the help.

    Args:
        parser: what to add to.
        keys: by name.
        flags: booleans take no value, and no key takes several: where words without a key may follow.
    """
    topics: dict[str, Any] = {}
    for key in keys.values():
        group = topics.setdefault(key.topic, None) or parser.add_argument_group(key.topic)
        topics[key.topic] = group
        is_flag = flags and key.default is False
        options: dict[str, Any] = {"action": "store_true"} if is_flag else {"metavar": _metavar(key)}
        if not flags:
            options["nargs"] = "*"
        group.add_argument(f"--{key.name}", help=describe(key).replace("%", "%%"), **options)


def describe(key: Key) -> str:
    """What `--help` says of a key: its help, the values it may have, its default."""
    choices = f" ({', '.join(key.choices)})" if key.choices and not all(c in key.help for c in key.choices) else ""
    silent = key.default is None or (key.default is False and bool in key.types)
    return f"{' '.join(key.help.split())}{choices}" + ("" if silent else f" [{_plain(key.default)}]")


def _plain(value: Any) -> str:
    value = value.value if isinstance(value, enum.Enum) else value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(key: Key) -> str:
    """The kind of value, in capitals."""
    named = {bool: "BOOL", int: "INT", float: "FLOAT", list: "LIST", dict: "MAPPING"}
    if str in key.types:
        return "TEXT"
    return next((text for kind, text in named.items() if kind in key.types), "VALUE")


def make_parser(prog: str, usage: str, description: str = "", **options: Any) -> argparse.ArgumentParser:
    """A parser as all verbs have it: no abbreviations, nothing for what was not given."""
    return argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} {usage}",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        **options,
    )


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str], keys: Mapping[str, Key]
) -> tuple[dict[str, Any], list[str]]:
    """(raw values by key, problems) of `--key value` arguments. Prints `--help` and exits.

    A key may be followed by several words (a list), or by none where it is true or false.
    """
    known, extra = parser.parse_known_args(_attach_numbers(argv))
    problems, previous = [], ""
    for token in extra:
        if token.startswith("--"):
            problems.append(unknown(token[2:].split("=")[0], keys, "--"))
        elif not previous.startswith("--"):
            problems.append(f"{token!r} is not a key; keys are written --key value.")
        previous = token
    values: dict[str, Any] = {}
    for name, tokens in vars(known).items():
        if len(tokens) == 1:
            values[name] = tokens[0]
        elif tokens and name in keys and list not in keys[name].types:
            problems.append(f"--{name} takes one value, not {len(tokens)}: {', '.join(tokens)}.")
        elif tokens:
            values[name] = tokens
        elif name in keys and bool in keys[name].types:
            values[name] = True
        else:
            problems.append(f"--{name} needs a value.")
    return values, problems


def parse_words(
    parser: argparse.ArgumentParser, argv: Sequence[str], keys: Mapping[str, Key]
) -> tuple[list[str], dict[str, Any], list[str]]:
    """(words, values by key, problems) where words without a key come among the options; after `--` all are words."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, rest = argv[:cut], argv[cut + 1 :]
    # argparse takes a word that begins with a dash for an option, and ends with a message of its own.
    words, tokens, iterator = [], [], iter(argv)
    problems: list[str] = []
    for token in iterator:
        name, has_value, _ = token[2:].partition("=")
        if token in ("-h", "--help"):
            tokens.append(token)
        elif not token.startswith("--"):
            words.append(token)
        elif name not in keys:
            problems.append(unknown(name, keys, "--"))
        elif has_value and keys[name].default is False:
            try:
                tokens += [f"--{name}"] if coerce(token.partition("=")[2], keys[name]) else []
            except ValueError as error:
                problems.append(f"--{name}: {error}")
        elif has_value or keys[name].default is False:
            tokens.append(token)
        else:
            value = next(iterator, None)
            if value is None:
                problems.append(f"--{name} needs a value.")
            else:
                tokens.append(f"{token}={value}")
    raw = vars(parser.parse_args(tokens))
    values = {}
    for name, value in raw.items():
        try:
            values[name] = coerce(value, keys[name])
        except ValueError as error:
            problems.append(f"--{name}: {error}")
    return [*words, *rest], values, problems


def unknown(name: str, keys: Mapping[str, Key], dashes: str = "") -> str:
    """What to say of a name that is no key."""
    if name == "hub_token":
        return "hub_token is not a key, so that it ends up in no file: set HF_TOKEN, or run `hf auth login`."
    return f"{dashes}{name} is not a key.{nearest(name, keys)}"


def _attach_numbers(argv: Sequence[str]) -> list[str]:
    """`--key -1e-3` as `--key=-1e-3`: argparse takes a negative number with an exponent for an option."""
    joined: list[str] = []
    for token in argv:
        if token.startswith("-") and _is_float(token) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def commented_yaml(keys: Mapping[str, Key], values: Mapping[str, Any], width: int = 118) -> Iterator[str]:
    """Lines of a YAML file with every key: its topic, its help, its value."""
    topic = ""
    for key in keys.values():
        if key.topic != topic:
            topic = key.topic
            yield from ("", f"# ---- {topic} ".ljust(width, "-"))
        yield from textwrap.wrap(describe(key), width, initial_indent="# ", subsequent_indent="# ")
        value = values[key.name].value if isinstance(values[key.name], enum.Enum) else values[key.name]
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
        yield f"{key.name}: {text.removesuffix('...' + chr(10)).strip()}"
