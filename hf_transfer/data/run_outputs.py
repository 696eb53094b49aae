"""What runs have written into a folder of data, and is no data: their `output_dir` is often inside of it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from hf_transfer.run_folder import CARD, EXAMPLES, HISTORY, MODEL_FILES, OF_ONE_RUN, RESULTS, RUN_FILE

_WRITTEN_BY_RUNS = (CARD, RUN_FILE, *OF_ONE_RUN, *MODEL_FILES)
_MARKS = (RESULTS, EXAMPLES, HISTORY, "config.json")  # next to run.yaml; a run that has just begun has the second only


def is_run_folder(folder: Path) -> bool:
    """Whether a run, finished or not, has this folder as its `output_dir`."""
    return (folder / RUN_FILE).is_file() and any((folder / name).is_file() for name in _MARKS)


def is_run_file(path: Path) -> bool:
    """Whether a run has written this file into its folder or into a checkpoint; other files there may be data."""
    inside = path.parent
    if inside.name.startswith("checkpoint-") and is_run_folder(inside.parent):
        return True
    return any(fnmatch(path.name, pattern) for pattern in _WRITTEN_BY_RUNS) and is_run_folder(inside)
