"""Processes that are forks of this one, which has imported everything already: a tenth of a second instead of ten.

For what is about the program and not about its start: what ends a process, fills a disk, becomes another user, gets a
signal or talks to other ranks. A fork has none of its parent's threads, so that torch uses one there.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hf_transfer.cli import main


def hasten() -> None:
    """Nothing waits for the disk from now on: no test cuts the power, and what is written outlives any process."""
    os.fsync = os.fstat  # type: ignore[assignment]


def settle() -> None:
    """Leave all that is in memory now out of later garbage collections.

    Each `train()` asks for a collection (accelerate's `free_memory`), which looks at half a million imported objects
    for a quarter of a second; and forks share what is never looked at. What is dropped is freed as before, unless it
    lies in a cycle.
    """
    gc.collect()
    gc.freeze()


class Fork:
    """A running fork, with what it is given and writes."""

    def __init__(self, run: Callable[[], int | None], stdin: bytes = b"", first: Callable[[], object] = int):
        if not hasattr(os, "fork"):
            pytest.skip("needs fork")
        self.said = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 - `wait` closes them
        self.returncode: int | None = None
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            self.pid = os.fork()
            if not self.pid:
                _be_child((given, *self.said), run, first)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._ended(os.WNOHANG)

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        code = self._ended(0)
        assert code is not None
        said = []
        for file in self.said:
            file.seek(0)
            said.append(file.read().decode())
            file.close()
        return subprocess.CompletedProcess(["hf-transfer"], code, *said)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _be_child(files: Any, run: Callable[[], int | None], first: Callable[[], object]) -> None:
    import torch

    code = 70
    try:
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # tests that run in the background of a shell
            signal.signal(signal.SIGINT, signal.default_int_handler)
        first()
        sys.stdin = os.fdopen(0, "r", closefd=False)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        code = run() or 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(*argv: object, stdin: bytes = b"", first: Callable[[], object] = int) -> Fork:
    """`hf-transfer ARGV`, running; `first` runs in the fork before it.

    Limits, users and signals that are set there end with the fork.
    """
    return Fork(lambda: main([str(word) for word in argv]), stdin, first)


def hf_transfer(
    *argv: object, stdin: bytes = b"", first: Callable[[], object] = int
) -> subprocess.CompletedProcess[str]:
    """The same at its end: the exit code and what it wrote."""
    return start(*argv, stdin=stdin, first=first).wait()


def fork(
    run: Callable[[], int | None], stdin: bytes = b"", first: Callable[[], object] = int
) -> subprocess.CompletedProcess[str]:
    """As `hf_transfer`, for any function that returns an exit code."""
    return Fork(run, stdin, first).wait()


# ---- several that talk to each other -------------------------------------------------------------------------------


def ranks(
    processes: int, run: Callable[[], int | None], log: Path, places: Sequence[Mapping[str, str]] = ()
) -> list[int]:
    """The exit code of each rank; gloo between them where they are several. If one is killed, so are the others.

    Args:
        processes: number of ranks.
        run: what each of them does.
        log: file to which they append what they write.
        places: environment of each rank, as a launcher makes it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {
        rank: Fork(run, first=partial(_be_rank, rank, processes, port, places[rank:])) for rank in range(processes)
    }
    codes: dict[int, int] = {}
    while running:
        for rank, process in list(running.items()):
            if process.poll() is None:
                continue
            done = running.pop(rank).wait()
            codes[rank] = done.returncode
            with log.open("a") as file:
                file.write(done.stdout + done.stderr)
            if done.returncode < 0:  # the others wait for it: what a launcher does
                for other in running.values():
                    other.send(signal.SIGKILL)
        time.sleep(0.005)
    return [codes[rank] for rank in range(processes)]


def _be_rank(rank: int, processes: int, port: int, places: Sequence[Mapping[str, str]]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if places:
        os.environ.clear()
        os.environ.update(places[0])
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the launcher's, which has ended
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
