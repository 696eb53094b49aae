"""A command in a fork of this process, which has imported everything already: a tenth of a second instead of ten."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest

from hf_transfer.cli import main


def hf_transfer(
    *argv: object, stdin: bytes = b"", first: Callable[[], object] = int
) -> subprocess.CompletedProcess[str]:
    """`hf-transfer ARGV` with what it wrote and its exit code; `first` runs in the fork before it.

    Limits, users and signals that are set there end with the fork.
    """
    return fork(lambda: main([str(word) for word in argv]), stdin, first)


def fork(
    run: Callable[[], int | None], stdin: bytes = b"", first: Callable[[], object] = int
) -> subprocess.CompletedProcess[str]:
    """As `hf_transfer`, for any function that returns an exit code."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        child = os.fork()
        if not child:
            code = 70
            try:
                for number, file in enumerate((given, out, err)):
                    os.dup2(file.fileno(), number)
                sys.stdin = os.fdopen(0, "r", closefd=False)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                first()
                code = run() or 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(["hf-transfer"], os.waitstatus_to_exitcode(status), *said)
