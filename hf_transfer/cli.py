"""`hf-transfer VERB [--config FILE.yaml] [--key value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from .errors import UserError, UserErrors, nearest

USAGE = """usage: hf-transfer VERB [--config FILE.yaml] [--key value ...]

verbs:
  train    fine-tune a pretrained model on a data set

`hf-transfer VERB --help` lists a verb's keys, with their defaults."""


def train(argv: Sequence[str]) -> None:
    """Run a recipe."""
    import torch

    from .config import Config, parse_command_line
    from .keys import read_config_file
    from .run import run

    given, problems = parse_command_line(argv)
    path = given.pop("config", None)
    if isinstance(path, list):
        raise UserError(f"--config takes one file, not {len(path)}.")
    run(Config.from_sources(read_config_file(path) if path else {}, given, problems))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads abort a process that ends without this, now and then


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"train": train}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    try:
        if argv[0] not in VERBS:
            raise UserError(f"{argv[0]!r} is not a verb.", f"There are {', '.join(VERBS)}.{nearest(argv[0], VERBS)}")
        VERBS[argv[0]](argv[1:])
    except UserError as error:
        sys.stderr.write(_format(error))
        return 2
    return 0


def _format(error: UserError) -> str:
    if isinstance(error, UserErrors):
        return f"hf-transfer: {error}\n"
    return f"hf-transfer: {error.message}\n" + (f"{error.fix}\n" if error.fix else "")
