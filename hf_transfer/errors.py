"""The errors that are meant for the person at the keyboard."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar


class UserError(ValueError):
    """Bad input: `message` says what is wrong and `fix` what to do about it.

    The command line prints both and exits with `exit_code`, without a traceback. It is a `ValueError`, so Python
    callers can catch it as one.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, fix: str = ""):
        self.message, self.fix = _said_by_a_worker(message) or message, fix
        super().__init__(f"{self.message} {fix}".strip())


class UserErrors(UserError):
    """Several problems of one configuration, reported together."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem:" if count == 1 else f"{count} problems:"
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


class WorkFailed(UserError):
    """The input is right, but the world is not: the disk is full, the hub cannot be reached."""

    exit_code = 1


class Interrupted(SystemExit):
    """A signal came, and a checkpoint was saved. Its code is 143 after SIGTERM and 130 after SIGINT."""


def _said_by_a_worker(text: str) -> str:
    """The message within what torch makes of an error in a loader's worker: a traceback as text, the message last."""
    found = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\n", text)
    return text.rpartition(f".{found[1]}: ")[2].strip() if found else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or an empty string where nothing is close."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, on one line and not too long."""
    return " ".join(str(error).split())[:most]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
