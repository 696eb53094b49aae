"""`hf-transfer benchmark`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import RunArguments, help_of, keys_with, read_words, words_parser
from hf_transfer.config.arguments.export import FORMS, PACKAGES, check_installed
from hf_transfer.config.fields import Key, setting, settings_of, wrong_values
from hf_transfer.config.places import check_data, check_run
from hf_transfer.errors import UserError, nearest
from hf_transfer.run_folder import EXPORT

HELP = (
    "A table of a trained model's forms on this machine's CPU: size, time of one example, examples per second, and "
    "accuracy. Without EXPORT, the forms whose packages are installed are made in a temporary folder. RUN is the "
    "folder of a run or of any saved model, or a hub id; EXPORT is a folder that `hf-transfer export` wrote."
)


@dataclass
class BenchmarkArguments:
    """What is measured."""

    forms: str | list[str] | None = setting(
        None, f"forms to make: {', '.join(FORMS)} (default: those whose packages are installed)"
    )
    dataset_name: str | None = setting(
        None, "labeled data: hub id, file, folder or bundled:<name> (default: the run's validation split)"
    )
    max_predict_samples: int = setting(512, "examples that accuracy is measured on, drawn by class")
    seconds: float = setting(3.0, "time to measure each form for, in seconds, singly and in batches", above=0)
    per_device_eval_batch_size: int | None = setting(None, "examples per batch (default: the run's)")
    json: bool = setting(False, "print one JSON object instead of a table")
    trust_remote_code: bool = setting(False, "run code from the model's repository")


SECTIONS = (("benchmark", BenchmarkArguments), ("run", RunArguments))


def keys() -> dict[str, Key]:
    return keys_with(*SECTIONS)


def parser() -> argparse.ArgumentParser:
    return words_parser("benchmark", "RUN [EXPORT ...]", HELP, keys())


def _check(words: list[str], values: dict[str, Any]) -> None:
    """Raises:
    UserError: what is typed is wrong.
    """
    if not words:
        raise UserError("A RUN is needed: the folder of a run, or a hub id.", help_of("benchmark"))
    for problem in wrong_values(values, settings_of(BenchmarkArguments)):
        raise UserError(problem)
    values["forms"] = [values["forms"]] if isinstance(values["forms"], str) else values["forms"]
    if values["forms"] and len(words) > 1:
        raise UserError("forms: it says what is made where no EXPORT is given.", "Leave out one of them.")
    for name in values["forms"] or ():
        if name not in FORMS:
            raise UserError(f"forms: {name!r} is not one of {', '.join(FORMS)}.{nearest(name, FORMS)}")
        check_installed(FORMS[name][0], PACKAGES[FORMS[name][0]].writes)
    check_run(words[0])
    for word in words[1:]:
        if not (Path(word) / EXPORT).is_file():
            raise UserError(f"EXPORT: {word!r} is not a folder that `hf-transfer export` wrote.")
    if values["dataset_name"]:
        check_data(values["dataset_name"])


def run(argv: Sequence[str]) -> int:
    """Measure a trained model's forms."""
    words, values = read_words(parser(), argv, keys(), _check)

    with quick_imports():
        from hf_transfer.files import as_json
        from hf_transfer.inference.benchmarking import benchmark

    own = ("allow_pickle", "trust_remote_code", "per_device_eval_batch_size")
    table = benchmark(
        words[0],
        words[1:],
        forms=values["forms"],
        data=values["dataset_name"],
        max_examples=values["max_predict_samples"],
        seconds=values["seconds"],
        model_revision=values["revision"],
        **{name: values[name] for name in own},
    )
    print(json.dumps(as_json(table.to_dict())) if values["json"] else "\n".join(table.lines()))
    return 0
