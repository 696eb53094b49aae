"""`hf-transfer push`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import help_of, keys_with, read_words, words_parser
from hf_transfer.config.fields import Key, setting
from hf_transfer.errors import UserError

HELP = (
    "Push a finished run to the hub that HF_ENDPOINT names: its model or adapter, labels, tokenizer or image processor "
    "and card. RUN is the folder of a run. Who pushes is said by HF_TOKEN or by `hf auth login`."
)


@dataclass
class PushArguments:
    """What is pushed, and where to."""

    hub_model_id: str | None = setting(None, "owner/name, or a name of one's own (default: the name of RUN's folder)")
    merged: bool = setting(False, "push a plain model, the adapter in its weights")
    revision: str | None = setting(None, "branch, made where there is none (default: main)")
    commit_message: str | None = setting(None, "message of the commit")
    private: bool = setting(False, "make the repository private, which is the default")
    public: bool = setting(False, "make the repository public")
    with_report: bool = setting(
        False, "push the report, wrong answers, labels that look wrong and pictures too, which show the data"
    )


def keys() -> dict[str, Key]:
    return keys_with(("push", PushArguments))


def parser() -> argparse.ArgumentParser:
    return words_parser("push", "RUN --hub_model_id OWNER/NAME", HELP, keys())


def run(argv: Sequence[str]) -> int:
    """Push a run to a hub."""
    words, values = read_words(parser(), argv, keys())
    if len(words) != 1:
        raise UserError(f"One RUN is needed, a run's folder; {len(words)} were given.", help_of("push"))
    if values["private"] and values["public"]:
        raise UserError("private and public contradict each other: keep one.")

    with quick_imports():
        from hf_transfer.hub.push import Target, push

    private = False if values["public"] else True if values["private"] else None
    own = ("hub_model_id", "merged", "revision", "commit_message", "with_report")
    done = push(words[0], Target(**{name: values[name] for name in own}, private=private))
    if not values["quiet"]:
        print("\n".join(done.lines()))
    return 0
