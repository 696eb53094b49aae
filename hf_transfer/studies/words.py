"""Whether a comparison can be asked for at all, as far as its own words tell. Imports no torch and no optuna."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from hf_transfer.errors import UserError, option


def refuse_processes() -> None:
    """Raises:
    UserError: this is one of several processes of a launcher, which would all run the same cells.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "compare runs in one process: call it without `accelerate launch` or torchrun.",
            "Several machines share the cells as jobs with --cell; see launch/slurm_array.sbatch.",
        )


def check_optuna() -> None:
    """Raises:
    UserError: optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "it needs optuna, which is not installed.",
            'Install it with `pip install "hf-transfer-toolkit[hpo]"`.',
            key="search",
        )


def check_words(search: Any, trials: int | None, prune: bool, grid: Any, cell: int | None = None) -> None:
    """Check that what is asked fits together.

    Args:
        search: not yet read; None without one.
        trials: None where nothing was given.
        prune: whether hopeless trials are stopped.
        grid: values by key, not yet read.
        cell: number of a cell that is to be run alone.

    Raises:
        UserError: it does not; optuna is not installed.
    """
    if search is None:
        for name in [*(["trials"] if trials is not None else []), *([] if prune else ["prune"])]:
            raise UserError(
                "it is of a search, and there is none.",
                f"Give {option('search', '{learning_rate: [1e-5, 1e-3, log]}')}, or leave it out.",
                key=name,
            )
        return
    if trials is not None and trials < 1:
        raise UserError(f"expected a positive number, got {trials}.", key="trials")
    if grid:
        raise UserError(
            "a search and a grid exclude each other.",
            "Give the values of the grid as choices: '{strategy: [gradual, full], learning_rate: [1e-5, 1e-3, log]}'.",
            key="search",
        )
    if cell is not None:
        raise UserError(
            "a search has no numbered cells, since every trial is chosen from the ones before.",
            f"Leave {option('cell')} out, or give a grid.",
            key="search",
        )
    check_optuna()
