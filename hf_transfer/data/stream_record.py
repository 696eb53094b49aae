"""What a stream gave to training, by content, collected while it passes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.data.record import Array, hash_of


@dataclass(frozen=True)
class Passed:
    """The content of the examples that were read for training: 8 bytes each, in a file for each process that reads.

    Attributes:
        folder: holds the files while training lasts.
    """

    folder: Path

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[Sequence[Any]], Any]]:
        """Context with a function that records an example, given the values of its input columns."""
        try:
            file = (self.folder / str(os.getpid())).open("ab", buffering=0)  # a process may end without closing it
        except FileNotFoundError:  # the folder is there while training lasts; workers also read before and after
            yield lambda example: None
            return
        with file:
            yield lambda example: file.write(hash_of(example))

    def begin(self) -> None:
        """Record from now on."""
        self.end()
        self.folder.mkdir(parents=True)

    def contents(self) -> Array:
        """(examples,) uint64, the hash of each different example, in order."""
        read = [np.fromfile(file, dtype="<u8") for file in sorted(self.folder.glob("*"))]
        return np.unique(np.concatenate(read)) if read else np.empty(0, np.uint64)

    def end(self) -> None:
        """Record nothing more, and forget what was recorded."""
        shutil.rmtree(self.folder, ignore_errors=True)
