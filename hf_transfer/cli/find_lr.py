"""`hf-transfer find-lr`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.launching import LaunchArguments, start_if_asked
from hf_transfer.cli.words import check_run, read_run, run_keys, run_parser
from hf_transfer.config.fields import Key, setting

HELP = (
    "Learning-rate range test of a run, with the keys of train: the loss of its training steps at a rising learning "
    "rate, and the learning rates that it suggests. The model is left as it was; find_lr.png and find_lr.csv are "
    "written to the output folder."
)


@dataclass
class FindLrArguments(LaunchArguments):
    """What the range test goes through."""

    num_steps: int = setting(100, "number of training steps", above=0)
    start_learning_rate: float = setting(1e-7, "learning rate of the first step", above=0)
    end_learning_rate: float = setting(1.0, "learning rate of the last step, if the loss has not diverged", above=0)
    stage: int | None = setting(
        None, "number of the stage to try, from 1 (default: the first that trains the backbone)", above=0
    )


def parser() -> argparse.ArgumentParser:
    return run_parser("find-lr", HELP, FindLrArguments)


def keys() -> dict[str, Key]:
    return run_keys("find-lr", FindLrArguments)


def run(argv: Sequence[str]) -> int:
    """Show which learning rates suit a run."""
    from hf_transfer.analysis.range_test import Sweep
    from hf_transfer.keys import NEEDS

    file, given, values, problems = read_run("find-lr", argv, parser(), FindLrArguments)
    sweep = Sweep(
        start=values["start_learning_rate"],
        end=values["end_learning_rate"],
        steps=values["num_steps"],
        stage=None if values["stage"] is None else values["stage"] - 1,
    )
    starts = values["num_processes"] is not None or values["launch"] is not None
    check_run(file, given, problems, NEEDS, talks=not starts)
    sweep.check()
    if (code := start_if_asked("find-lr", argv, values, file, given)) is not None:
        return code

    with quick_imports():
        from hf_transfer.runs.finding_rate import find_lr
        from hf_transfer.settings import Config

    find_lr(Config.from_sources(file, given), sweep, talks=not values["quiet"])
    return 0
