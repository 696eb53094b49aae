"""`hf-transfer train`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.launching import LaunchArguments, start_if_asked
from hf_transfer.cli.words import check_run, read_run, run_keys, run_parser
from hf_transfer.config.fields import Key, setting
from hf_transfer.errors import UserErrors


@dataclass
class TrainArguments(LaunchArguments):
    """What `train` does instead of training, and in how many processes."""

    print_config: bool = setting(False, "print a YAML file of all keys with their help, and end")


def parser() -> argparse.ArgumentParser:
    return run_parser("train", "Fine-tune a pretrained model on a dataset.", TrainArguments)


def keys() -> dict[str, Key]:
    return run_keys("train", TrainArguments)


def run(argv: Sequence[str]) -> int:
    """Run a recipe."""
    from hf_transfer.keys import NEEDS, to_commented_yaml

    file, given, values, problems = read_run("train", argv, parser(), TrainArguments)
    if values["print_config"]:
        if problems:
            raise UserErrors(problems)
        print(to_commented_yaml({**file, **given}), end="")
        return 0
    starts = values["num_processes"] is not None or values["launch"] is not None
    check_run(file, given, problems, NEEDS, talks=not starts)
    if (code := start_if_asked("train", argv, values, file, given)) is not None:
        return code

    with quick_imports():
        import torch

        from hf_transfer.runs.run import run as run_config
        from hf_transfer.settings import Config

    config = Config.from_sources(file, given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"hf_transfer\.runs\.run$")  # that a push failed is raised here
        result = run_config(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads abort a process that ends without this, now and then
    if result.push_error is not None:
        raise result.push_error
    return 0
