"""`VERB --help`, `--help-all` and `--help KEY`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_transfer.cli.verbs import VERBS
from hf_transfer.config.arguments.short_help import EXAMPLES, SHORT
from hf_transfer.config.command_line import add_keys, kind_of_value, make_parser, plain, unknown
from hf_transfer.config.fields import Key
from hf_transfer.errors import UserError

HELP, HELP_ALL = ("-h", "--help"), ("--help-all", "--help_all")
WIDTH = 100
WORDS = (
    "  MODEL    hub id, folder of a saved model, timm/<name>, or bundled:<name> [the installed one that suits DATA]\n"
    "  DATA     hub id, image folder, CSV, JSON or Parquet file or folder, or bundled:<name>\n"
    "  OUT      folder that the run is written to [runs/<data>-<model>-<n>]\n"
)
RESUMING = {
    "fixed": "a resumed run with another value is refused.",
    "plan": "a resumed run with another value is refused without --allow_changed_plan true.",
    "free": "a resumed run may have another value.",
}


def page(verb: str, argv: Sequence[str]) -> str:
    """The page that the words after a verb ask for; empty if they ask for none.

    Raises:
        UserError: help is asked for on a key that there is not.
    """
    options = list(argv[: argv.index("--")] if "--" in argv else argv)
    place = next((i for i, word in enumerate(options) if word in HELP), None)
    if any(word in HELP_ALL for word in options):
        return VERBS[verb].parser().format_help()
    if place is None:
        return ""
    keys = VERBS[verb].keys()
    following = options[place + 1] if place + 1 < len(options) else ""
    wanted = following.lstrip("-")
    if wanted in keys:
        return about(verb, keys[wanted])
    if wanted and not following.startswith("-"):
        raise UserError(unknown(wanted, keys, "--"), f"`hf-transfer {verb} --help-all` lists every key.")
    return short(verb, keys) if set(SHORT["data"]) <= set(keys) else VERBS[verb].parser().format_help()


def short(verb: str, keys: Mapping[str, Key]) -> str:
    """The keys that most runs need, and the verb's own."""
    usage = "[MODEL] DATA [OUT] [--config FILE.yaml] [--key value ...]"
    brief = make_parser(f"hf-transfer {verb}", usage, add_help=False)
    chosen = [replace(keys[name], topic=topic) for topic, names in SHORT.items() for name in names]
    own = [key for key in keys.values() if not key.about.resume and key.topic in ("instead", "shown", "output")]
    add_keys(brief, {key.name: key for key in (*chosen, *own)})
    usage, _, listed = brief.format_help().partition("\n\n")
    about = textwrap.fill(VERBS[verb].parser().description or "", WIDTH)
    return (
        f"{usage}\n\n{about}\n\n{WORDS}\n{listed}\n"
        "These are the keys that most runs need. More help:\n"
        f"  hf-transfer {verb} --help-all   every key, with its unit and default ({len(keys)} of them)\n"
        f"  hf-transfer {verb} --help KEY   one key: its values, what reads it, an example\n"
    )


def about(verb: str, key: Key) -> str:
    """Everything that is known about one key."""
    shown = example(key)
    default = "none" if key.default is None else plain(key.default)
    facts = {
        "values": ", ".join(key.choices) or key.about.range,
        "default": default,
        "read by": ", ".join(key.about.used_by),
        "resuming": RESUMING[key.about.resume] if key.about.resume else "",
        "topic": key.topic,
        "example": f"--{key.name} {_quoted(shown)}, or in YAML {key.name}: {shown}" if shown else "",
    }
    head = textwrap.fill(" ".join(key.help.split()), WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines = [
        textwrap.fill(text, WIDTH, initial_indent=f"  {name:<9} ", subsequent_indent=" " * 12)
        for name, text in facts.items()
        if text
    ]
    return "\n".join([f"hf-transfer {verb} --{key.name} {kind_of_value(key)}", "", head, "", *lines, ""])


def example(key: Key) -> str:
    """A value of the key as YAML; empty if it is a text, of which nothing more is known."""
    if key.name in EXAMPLES:
        return EXAMPLES[key.name]
    if other := [choice for choice in key.choices if choice != key.default]:
        return other[0]
    if bool in key.types:
        return plain(not key.default)
    if key.default is not None:
        return plain(key.default) if not isinstance(key.default, list | dict) else ""
    samples = (0.1, 1, 16) if str not in key.types and {int, float} & set(key.types) else ()
    return next((plain(n) for n in samples if _takes(key, n)), "")


def _takes(key: Key, number: float) -> bool:
    return (float in key.types or isinstance(number, int)) and key.about.holds(number)


def _quoted(text: str) -> str:
    return f"'{text}'" if any(c in text for c in " {[") else text
