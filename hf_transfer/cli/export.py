"""`hf-transfer export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import RunArguments, help_of, keys_with, read_words, words_parser
from hf_transfer.config.arguments.export import ExportArguments
from hf_transfer.config.fields import Key, setting
from hf_transfer.config.places import check_data, check_run
from hf_transfer.errors import UserError

HELP = (
    "Write a trained model for another runtime into the new folder OUT, with its tokenizer or image processor, labels "
    "and thresholds. What is written is compared with PyTorch on real inputs first, and kept only if it agrees. "
    "predict and evaluate take OUT like a run. RUN is the folder of a run or of any saved model, or a hub id."
)


@dataclass
class CheckArguments:
    """What it is checked on."""

    dataset_name: str | None = setting(
        None, "labeled data to check on: hub id, file, folder or bundled:<name> (default: the run's validation split)"
    )
    trust_remote_code: bool = setting(False, "run code from the model's repository")


SECTIONS = (("export", ExportArguments), ("check", CheckArguments), ("run", RunArguments))


def keys() -> dict[str, Key]:
    return keys_with(*SECTIONS)


def parser() -> argparse.ArgumentParser:
    return words_parser("export", "RUN OUT", HELP, keys())


def _check(words: list[str], values: dict[str, Any]) -> None:
    """Check what is typed, and take the second word as the folder.

    Raises:
        UserError: it is wrong.
    """
    if not 1 <= len(words) <= 2:
        raise UserError(f"RUN and OUT are needed; {len(words)} words were given.", help_of("export"))
    if len(words) == 2:
        if values["output_dir"]:
            raise UserError(f"output_dir: {words[1]!r} was given as OUT too; keep one.")
        values["output_dir"] = words[1]
    _arguments(values).check()
    check_run(words[0])
    if values["dataset_name"]:
        check_data(values["dataset_name"])


def _arguments(values: dict[str, Any]) -> ExportArguments:
    return ExportArguments(**{f.name: values[f.name] for f in fields(ExportArguments)})


def run(argv: Sequence[str]) -> int:
    """Export a trained model."""
    words, values = read_words(parser(), argv, keys(), _check)

    with quick_imports():
        from hf_transfer.inference.exporting import Exporter
        from hf_transfer.inference.predictor import Predictor

    own = ("allow_pickle", "trust_remote_code")
    predictor = Predictor.load(words[0], model_revision=values["revision"], **{name: values[name] for name in own})
    done = Exporter(predictor, values["dataset_name"]).export(_arguments(values))
    if not values["quiet"]:
        print("\n".join(done.lines()))
    return 0
