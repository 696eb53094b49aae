"""Keys as options: `--help`, parsing of `--key value`, and YAML with a comment per key."""

from __future__ import annotations

import argparse
import enum
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from hf_transfer.config.arguments.other_names import NOTES, SECRETS, SYNONYMS
from hf_transfer.config.fields import Key
from hf_transfer.config.places import is_data
from hf_transfer.config.values import coerce
from hf_transfer.errors import closest

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
        options: dict[str, Any] = {"action": "store_true"} if is_flag else {"metavar": kind_of_value(key)}
        if not flags:
            options["nargs"] = "*"
        group.add_argument(f"--{key.name}", help=describe(key).replace("%", "%%"), **options)


def describe(key: Key) -> str:
    """What `--help` says of a key: its help, the values it may have, its default."""
    choices = f" ({', '.join(key.choices)})" if key.choices and not all(c in key.help for c in key.choices) else ""
    silent = key.default is None or (key.default is False and bool in key.types)
    return f"{' '.join(key.help.split())}{choices}" + ("" if silent else f" [{plain(key.default)}]")


def plain(value: Any) -> str:
    """A value as it is typed."""
    value = value.value if isinstance(value, enum.Enum) else value
    return str(value).lower() if isinstance(value, bool) else str(value)


def kind_of_value(key: Key) -> str:
    """The kind of value, in capitals."""
    named = {bool: "BOOL", int: "INT", float: "FLOAT", list: "LIST", dict: "MAPPING"}
    number = next((text for kind, text in named.items() if kind in key.types and kind in (int, float)), "")
    if str in key.types:
        return number or "TEXT"  # a word in place of a number is in the help
    return next((text for kind, text in named.items() if kind in key.types), "VALUE")


def make_parser(prog: str, usage: str, description: str = "", **options: Any) -> argparse.ArgumentParser:
    """A parser as all verbs have it: no abbreviations, nothing for what was not given."""
    made = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} {usage}",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        **options,
    )
    if options.get("add_help", True):
        made.add_argument("--help-all", action="help", help="show every key and exit")
    return made


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str], keys: Mapping[str, Key]
) -> tuple[dict[str, Any], list[str]]:
    """(raw values by key, problems) of `--key value` arguments. Prints `--help` and exits.

    A key may be followed by several words (a list, also as `a, b`), or by none where it is true or false.
    """
    known, extra = parser.parse_known_args(_attach_numbers(argv))
    problems, previous = list[str](), ""
    for token in extra:
        if token.startswith("--"):
            problems.append(unknown(token[2:].split("=")[0], keys, "--"))
        elif not previous.startswith("--"):
            said = f"{token!r} stands after a key: MODEL, DATA and OUT come first, and keys are written --key value."
            problems.append(NotAKey(said, "dataset_name"))
        previous = token
    values: dict[str, Any] = {}
    for name, tokens in vars(known).items():
        if len(tokens) == 1:
            values[name] = tokens[0]
        elif tokens and name in keys and list not in keys[name].types:
            problems.append(f"--{name} takes one value, not {len(tokens)}: {', '.join(tokens)}.")
        elif tokens:
            with_commas = all(token.endswith(",") for token in tokens[:-1])
            values[name] = "".join(tokens) if with_commas else tokens
        elif name in keys and bool in keys[name].types:
            values[name] = True
        else:
            problems.append(f"--{name} needs a value.")
    return values, problems


def parse_run(
    parser: argparse.ArgumentParser, argv: Sequence[str], keys: Mapping[str, Key]
) -> tuple[dict[str, Any], list[str]]:
    """`parse_options` after up to three words, which are model, data and folder as far as these have no key.

    A single word that is data is no model.
    """
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    given, problems = parse_options(parser, argv[first:], keys)
    data = () if "train_file" in given else ("dataset_name",)
    names = [name for name in ("model_name_or_path", *data, "output_dir") if name not in given]
    words = argv[:first]
    if len(words) == 1 and names[:2] == ["model_name_or_path", "dataset_name"] and is_data(words[0]):
        names = names[1:]
    given.update(zip(names, words, strict=False))
    problems += [
        f"{word!r} is one word too many: MODEL, DATA and OUT come first, and keys are written --key value."
        for word in words[len(names) :]
    ]
    return given, problems


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


class NotAKey(str):
    """What to say of a name or word that is no key.

    Attributes:
        meant: the key that was probably meant, which is then not missing; empty if none is known.
    """

    meant: str

    def __new__(cls, text: str, meant: str = "") -> NotAKey:
        made = super().__new__(cls, text)
        made.meant = meant
        return made


def unknown(name: str, keys: Mapping[str, Key], dashes: str = "") -> NotAKey:
    """What to say of a name that is no key: what to do instead, what it is called here, or the nearest name."""
    plain = name.lower().replace("-", "_")
    note = SECRETS.get(plain) or (NOTES.get(plain) if "num_train_epochs" in keys else None)
    if note and plain not in keys:
        return NotAKey(f"{dashes}{name} is not a key; {note}")
    ours = next((k for k in (plain, SYNONYMS.get(plain, "")) if k in keys), "") or closest(plain, keys)
    hint = f" Did you mean {dashes}{ours}?" if dashes else f" Did you mean {ours!r}?"
    return NotAKey(f"{dashes}{name} is not a key.{hint if ours else ''}", ours)


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
