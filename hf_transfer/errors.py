"""The one error that is meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: `message` says what is wrong and `fix` what to do about it.

    The command line prints both and exits with code 2, without a traceback. It is a `ValueError`, so Python
    callers can catch it as one.
    """

    def __init__(self, message: str, fix: str = ""):
        self.message, self.fix = message, fix
        super().__init__(f"{message} {fix}".strip())


class UserErrors(UserError):
    """Several problems of one configuration, reported together."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem:" if count == 1 else f"{count} problems:"
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or an empty string where nothing is close."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
