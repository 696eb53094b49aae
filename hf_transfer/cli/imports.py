"""Imports of torch, transformers and what a verb needs of this package, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Context of a verb's imports: the collector rests, and from then on leaves alone what they defined.

    A few thousand modules make a million objects, none of which is garbage. The collector would go through them several
    times while they are made, now and then during the run, and once more when the process ends.

    Nothing is done where torch has been imported before: the process is then not the verb's own, and what it holds may
    become garbage.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
