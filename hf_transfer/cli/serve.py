"""`hf-transfer serve`."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from ipaddress import ip_address
from typing import Any

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
from hf_transfer.config.arguments.serving import Limits, ServeArguments
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
_BACKLOG = 2048  # connections that wait to be accepted

SECTIONS = (
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
    for problem in wrong_values(values, {**settings_of(ServeArguments), **settings_of(Limits)}):
        raise UserError(problem)
    check_extra("serve")
    _listening(values["host"], values["port"]).close()  # before the model is loaded


def run(argv: Sequence[str]) -> int:
    """Serve until the process is stopped."""
    words, values = read_words(parser(), argv, keys(), _check)

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
    with _listening(values["host"], values["port"]) as listening:
        listening.listen(_BACKLOG)
        if not values["quiet"]:
            say(_serving(served.names, values["host"], listening.getsockname()[1]))
        if not _is_loopback(listening.getsockname()[0]):
            sys.stderr.write("Anyone who reaches this address can send requests: there is no password.\n")
        serve(app, listening, values["verbose"])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address.

    Raises:
        UserError: it cannot be, because it is in use, is not this machine's, or needs other rights.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"host: {host!r} is not an address of this machine.", "Leave it out for 127.0.0.1.") from error
    bound = socket.socket(family, kind)
    try:
        if os.name == "posix":  # a port that was in use a moment ago; elsewhere it would take one that is in use
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _not_bound(error, host, port) from error
    return bound


def _not_bound(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port: {port} is in use on {host}.", "Stop what uses it, or choose another: --port 0 takes a free one."
        )
    if error.errno == errno.EACCES:
        return UserError(f"port: {port} needs administrator rights.", "Choose one from 1024 on.")
    return UserError(
        f"host: {host!r} is not an address of this machine ({error.strerror}).", "Leave it out for 127.0.0.1."
    )


def _serving(names: Sequence[str], host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    tasks = f"{len(names)} tasks ({named(names)})" if len(names) > 1 else names[0]
    return f"Serving {tasks} at http://{shown}:{port}: POST /predict, GET /tasks, GET /health. Ctrl+C stops it."


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback
