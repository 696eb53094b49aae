"""`hf-transfer VERB [--key value ...]`: words to functions, errors to exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from hf_transfer.cli.launching import is_first_to_fail
from hf_transfer.cli.verbs import VERBS
from hf_transfer.config.arguments.other_names import VERBS_ELSEWHERE
from hf_transfer.errors import UserError, UserErrors, WorkFailed, chain, from_command_line, nearest, one_line, option

SHELLS = ("bash", "zsh", "tcsh")
INTERRUPTED = 130


# ---- main ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 1 the work failed, 2 wrong input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with from_command_line():
        return _exit_code(argv)


def _exit_code(argv: list[str]) -> int:
    options = argv[: argv.index("--")] if "--" in argv else argv
    try:
        return _dispatch(argv)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if not is_first_to_fail():
            return INTERRUPTED
        resume = f" Continue with {option('resume_from_checkpoint', 'auto')}." if argv[:1] == ["train"] else ""
        sys.stderr.write(f"hf-transfer: interrupted.{resume}\n")
        return INTERRUPTED
    except Exception as error:
        if "--debug" in options:
            traceback.print_exc()
        shown = explain(error)
        if is_first_to_fail():
            sys.stderr.write(_format(shown))
        return shown.exit_code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from hf_transfer import __version__

        print(__version__)
        return 0
    if argv[0] == "--print_completion":
        return _print_completion(argv[1:])
    if argv[0] not in VERBS:
        ours = VERBS_ELSEWHERE.get(argv[0].lower())
        hint = f" Did you mean {ours!r}?" if ours else nearest(argv[0], VERBS)
        raise UserError(f"Unknown command {argv[0]!r}.{hint}", f"Available commands: {', '.join(VERBS)}.")
    from hf_transfer.cli.help import page

    if shown := page(argv[0], argv[1:]):
        print(shown, end="")
        return 0
    return VERBS[argv[0]].run(argv[1:])


def usage() -> str:
    """What `hf-transfer --help` prints."""
    verbs = "\n".join(f"  {name:<9} {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: hf-transfer VERB [--key value ...]\n\n"
        f"verbs:\n{verbs}\n\n"
        "`hf-transfer VERB --help` lists a verb's keys (of train and plan, those that most runs need), `--help-all`\n"
        "every key, with units and defaults, and `--help KEY` tells all about one.\n"
        "`hf-transfer train --print_config > recipe.yaml` writes a recipe with every key.\n"
        "`hf-transfer --print_completion SHELL` prints a script that completes verbs and keys "
        f"({', '.join(SHELLS)}).\n"
        "`hf-transfer --version` prints the version."
    )


def _print_completion(words: Sequence[str]) -> int:
    """A script for a shell. It is static: asking us at each tab would take seconds."""
    import shtab

    if len(words) != 1 or words[0] not in SHELLS:
        raise UserError(f"--print_completion takes one of {', '.join(SHELLS)}, not {' '.join(words) or 'nothing'}.")
    root = argparse.ArgumentParser(prog="hf-transfer")
    verbs = root.add_subparsers()
    for name, verb in VERBS.items():
        whole = verb.parser()
        part = verbs.add_parser(name, parents=[whole], conflict_handler="resolve", help=verb.summary)
        part.prog = whole.prog
        _add_choices(part)
    print(shtab.complete(root, shell=words[0]))
    return 0


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """The values of each key, and files where a key names one; argparse would check them with messages of its own."""
    import shtab

    from hf_transfer.keys import keys

    for action in parser._actions:
        key = keys().get(action.dest)
        if key is not None and key.choices:
            action.choices = key.choices
        elif action.dest.endswith(("_file", "_dir", "config", "output", "name_or_path", "dataset_name")):
            action.complete = shtab.FILE  # type: ignore[attr-defined]


# ---- errors and output ---------------------------------------------------------------------------------------------

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


def explain(error: Exception) -> UserError:
    """Any error as one that is meant for a person: the world's failures by their cause, our own mistakes as such."""
    if isinstance(error, UserError):
        return error
    for cause in chain(error):
        text = str(cause)
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _DISK or "No space left on device" in text or "os error 27" in text:
            return WorkFailed(
                f"The disk is full, or a quota is used up ({one_line(cause, 200)}).",
                "Make room, or choose an output_dir on another disk (HF_HOME moves the caches); then run it again.",
            )
        if number in _PERMISSION:
            return WorkFailed(f"{one_line(cause, 200)}.", "Change the permissions, or choose another folder.")
    return WorkFailed(
        f"{type(error).__name__}: {one_line(error, 500)}",
        "Add --debug to see where; if it looks like a mistake of ours, please report it.",
    )


def _format(error: UserError) -> str:
    if isinstance(error, UserErrors):
        return f"hf-transfer: {error}\n"
    return f"hf-transfer: {error.message}\n" + (f"{error.fix}\n" if error.fix else "")
