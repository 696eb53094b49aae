"""`hf-transfer serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.listening import listening, url
from hf_transfer.cli.words import (
    AbstainArguments,
    RunArguments,
    UseArguments,
    check_coverage,
    help_of,
    keys_with,
    read_words,
    words_parser,
)
from hf_transfer.config.arguments.serving import Limits, ListenArguments, ServeArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.config.extras import check_extra
from hf_transfer.config.fields import Key, settings_of, wrong_values
from hf_transfer.config.places import check_run
from hf_transfer.errors import UserError, named
from hf_transfer.files import say

HELP = (
    "Answer HTTP requests: POST /predict takes texts as JSON or images as uploads and answers as `predict` does, "
    "GET /tasks names the tasks and their labels, GET /health says that it runs. RUN is the folder of a saved "
    "HeadBank, of a run or of any saved model, or a hub id; several runs with adapters on one backbone share it. "
    "Ctrl+C stops it."
)
PORT = 8000
_BACKLOG = 2048  # connections that wait to be accepted

SECTIONS = (
    ("serve", ListenArguments),
    ("serve", ServeArguments),
    ("limits", Limits),
    ("answers", AbstainArguments),
    ("model", UseArguments),
    ("run", RunArguments),
    ("views", Views),
)


def keys() -> dict[str, Key]:
    return keys_with(*SECTIONS)


def parser() -> argparse.ArgumentParser:
    return words_parser("serve", "RUN...", HELP, keys())


def _check(words: list[str], values: dict[str, Any]) -> None:
    """Raises:
    UserError: what is typed is wrong, a package is missing, or the port is not free.
    """
    if not words:
        raise UserError("A RUN is needed: the folder of a run or of a saved HeadBank, or a hub id.", help_of("serve"))
    for word in words:
        check_run(word)
    check_coverage(values)
    for cls in (ListenArguments, ServeArguments, Limits):
        for problem in wrong_values(values, settings_of(cls)):
            raise UserError(problem)
    check_extra("serve")
    values["port"] = PORT if values["port"] is None else values["port"]
    listening(values["host"], values["port"]).close()  # before the model is loaded


def run(argv: Sequence[str]) -> int:
    """Serve until the process is stopped."""
    words, values = read_words(parser(), argv, keys(), _check)

    with quick_imports():
        from hf_transfer.evaluation.conformal import COVERAGE
        from hf_transfer.inference.http_app import make_app, serve
        from hf_transfer.inference.served import Served

    used = {f.name: values[f.name] for f in (*fields(UseArguments), *fields(Views))}
    coverage = (values["coverage"] or COVERAGE) if values["abstain"] else None
    served = Served.load(
        words, coverage, model_revision=values["revision"], allow_pickle=values["allow_pickle"], **used
    )
    limits = Limits(**{f.name: values[f.name] for f in fields(Limits)})
    app = make_app(served, limits, values["batch_wait"])
    with listening(values["host"], values["port"]) as bound:
        bound.listen(_BACKLOG)
        address = url(values["host"], bound)
        if not values["quiet"]:
            say(_serving(served.names, address))
        serve(app, bound, values["verbose"])
    return 0


def _serving(names: Sequence[str], url: str) -> str:
    tasks = f"{len(names)} tasks ({named(names)})" if len(names) > 1 else names[0]
    return f"Serving {tasks} at {url}: POST /predict, GET /tasks, GET /health. Ctrl+C stops it."
