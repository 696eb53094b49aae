"""Errors that are shown to the user without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar, Self

# ---- how the user sets a key ----

_commands = 0  # calls of the command line in progress; not a context variable, which threads would not inherit


@contextlib.contextmanager
def from_command_line() -> Iterator[None]:
    """Context in which the user has typed a command: `option` writes keys as the command line takes them."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1


def typed() -> bool:
    """Whether the user has typed a command, and does not call Python."""
    return bool(_commands)


def option(key: str, value: Any = None) -> str:
    """How the user sets a key: `--key value` where a command was typed, `key=value` in Python.

    Args:
        key: its name.
        value: what to set it to, which may be a list; None names the key alone.
    """
    if not typed():
        return key if value is None else f"{key}={value!r}"
    if value is None or value is True:
        return f"--{key}"
    if isinstance(value, list | tuple):  # as YAML, which every verb takes
        plain = [str(v) if re.fullmatch(r"[A-Za-z_][\w ]*", str(v)) else json.dumps(v) for v in value]
        value = f"[{', '.join(plain)}]"
    return f"--{key} {shlex.quote(str(value))}"


class UserError(ValueError):
    """Invalid input: `message` says what is wrong and `fix` what to do about it.

    The command line prints both and exits with `exit_code`, without a traceback. It is a `ValueError`, so Python
    callers can catch it as one.

    Args:
        message: what is wrong. torch raises an error of a data loader's worker again by this name of the argument.
        fix: what to do about it.
        key: the key at fault; the message starts with it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, fix: str = "", key: str = ""):
        self.problem, self.fix, self.key = _from_worker(message) or message, fix, key
        super().__init__(f"{self.message} {fix}".strip())

    @property
    def message(self) -> str:
        return f"{self.key}: {self.problem}" if self.key else self.problem

    def with_key(self, key: str) -> Self:
        """The same error about a value that has another name for the user."""
        return type(self)(self.problem, self.fix, key)


class UserErrors(UserError):
    """Several problems of one configuration, reported together."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem found:" if count == 1 else f"{count} problems found:"
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


class WorkFailed(UserError):
    """The input is valid, but something outside failed: the disk is full, the hub cannot be reached."""

    exit_code = 1


class Interrupted(SystemExit):
    """A signal arrived and a checkpoint was saved. The exit code is 143 after SIGTERM and 130 after SIGINT."""


def _from_worker(text: str) -> str:
    """The message inside an error that torch raised again for a data loader worker: the end of a traceback."""
    worker = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\n", text)
    return text.rpartition(f".{worker[1]}: ")[2].strip() if worker else ""


def closest(name: str, names: Iterable[str], least: float = 0.6) -> str:
    """The most similar of `names`, or an empty string if none has a similarity of `least` (0 to 1)."""
    return next(iter(difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=least)), "")


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or an empty string if no name is similar."""
    match = closest(name, names)
    return f" Did you mean {match!r}?" if match else ""


def unknown_keys(given: Iterable[object], known: Collection[str], owner: str) -> Iterator[str]:
    """For each key of a mapping that is not among the known ones a sentence, with the nearest of them.

    Args:
        given: keys of the mapping.
        known: those that it may have.
        owner: what has them, e.g. `a stage`.
    """
    for key in given:
        if key not in known:
            yield f"unknown key {key!r}; {owner} has {', '.join(known)}.{nearest(str(key), known)}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names, separated by commas, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def shortened(name: object, most: int = 60) -> str:
    """A name of at most `most` characters: its beginning and `…` where it is longer."""
    text = " ".join(str(name).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def named(names: Iterable[object], most: int = 5) -> str:
    """The first names of classes or columns, each shortened, and how many more there are."""
    return listed((shortened(name) for name in names), most)


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of a library's error on one line, truncated to `most` characters."""
    return " ".join(str(error).split())[:most]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
