"""`hf-transfer evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import InputArguments, RunArguments, help_of, keys_with, read_words, words_parser
from hf_transfer.config.arguments.examining import Examining
from hf_transfer.config.arguments.views import Views
from hf_transfer.config.fields import Key, setting
from hf_transfer.config.places import check_data, check_run, format_of
from hf_transfer.errors import UserError
from hf_transfer.run_folder import ERRORS

HELP = (
    "Metrics of a trained model on labeled data, with 95% intervals; by default on what the run held out. Examples "
    "that the run trained on are left out. RUN is the folder of a run or of any saved model, or a hub id. DATA is a "
    "file, a folder, a hub id or bundled:<name>, if other data than the run's is meant."
)


@dataclass
class EvaluateArguments:
    """What is evaluated on."""

    test_file: str | None = setting(None, "CSV, JSON or Parquet file with labels")
    dataset_name: str | None = setting(
        None, "hub id, image folder, file or folder, save_to_disk folder, or bundled:<name>"
    )
    dataset_config_name: str | None = setting(None, "the hub data set's configuration")
    split: str | None = setting(
        None,
        "split of the data (default: test, else validation, else the only one); train: measure what was trained on",
    )
    label_column_name: str | list[str] | None = setting(
        None, "label column, or several of 0 and 1 (default: the run's, label, labels, or the only class column)"
    )
    max_predict_samples: int | None = setting(None, "examples to evaluate on, drawn by class (default: all)")
    errors_file: str | None = setting(None, "CSV file for the wrong answers, the worst first (default: none)")
    json: bool = setting(False, "print one JSON object instead of lines")


SECTIONS = (
    ("data", EvaluateArguments),
    ("examining", Examining),
    ("inputs", InputArguments),
    ("run", RunArguments),
    ("views", Views),
)


def keys() -> dict[str, Key]:
    return keys_with(*SECTIONS)


def parser() -> argparse.ArgumentParser:
    return words_parser("evaluate", "RUN [DATA]", HELP, keys())


def _take_data(word: str, values: dict[str, Any]) -> None:
    """The second word: a file or pattern of files as `test_file`, anything else as `dataset_name`.

    Raises:
        UserError: a key names data too.
    """
    if other := next((name for name in ("test_file", "dataset_name") if values[name]), None):
        raise UserError(f"{other}: {word!r} was given as DATA too; keep one.")
    check_data(word)
    values["test_file" if format_of(Path(word)) else "dataset_name"] = word


def _check_errors_file(path: Path, values: dict[str, Any], run_folder: str) -> None:
    """Raises:
    UserError: the file cannot be made there, is no CSV file, or would replace one that is not its own.
    """
    if path.is_dir():
        raise UserError(f"errors_file: {str(path)!r} is a folder, not a file.")
    if path.suffix.lower() != ".csv":
        raise UserError(f"errors_file: {str(path)!r} does not end in .csv.")
    if not path.parent.is_dir():
        raise UserError(f"errors_file: there is no folder {str(path.parent)!r}.")
    taken = {"the data to evaluate on": values["test_file"] or values["dataset_name"]}
    taken["what the run wrote"] = str(Path(run_folder) / ERRORS)
    for what, other in taken.items():
        if other and path.resolve() == Path(other).resolve():
            raise UserError(f"errors_file: {str(path)!r} is {what}, and would be replaced.", "Name another file.")


def _check_ood_data(values: dict[str, Any]) -> None:
    """Raises:
    UserError: there is no such data, or it is what is evaluated on.
    """
    word = values["ood_data"]
    try:
        check_data(word)
    except UserError as error:
        raise error.with_key("ood_data") from error
    if word in (values["test_file"], values["dataset_name"]):
        raise UserError(f"ood_data: {word!r} is the data to evaluate on.", "Name data from elsewhere.")


def _check(words: list[str], values: dict[str, Any]) -> None:
    """Check what is typed, and take the second word as data.

    Raises:
        UserError: it is wrong.
    """
    if not 1 <= len(words) <= 2:
        raise UserError(
            f"One RUN is needed, a run's folder or hub id, and DATA at most; {len(words)} words were given.",
            help_of("evaluate"),
        )
    if len(words) == 2:
        _take_data(words[1], values)
    if values["test_file"] and values["dataset_name"]:
        raise UserError("test_file and dataset_name contradict each other: keep one.")
    if values["dataset_config_name"] and not values["dataset_name"]:
        raise UserError("dataset_config_name: it belongs to a dataset_name, and none is given.")

    if values["ood_data"]:
        _check_ood_data(values)
    check_run(words[0])
    if values["errors_file"]:
        _check_errors_file(Path(values["errors_file"]), values, words[0])


def _details(measured: dict[str, Any], problem_type: str) -> Iterator[str]:
    """Lines about what was measured beyond the metrics."""
    from hf_transfer.evaluation import tables

    yield from tables.format_calibration(measured["calibration"])
    yield from tables.format_classes(measured["per_class"])
    for column, groups in measured.get("subgroups", {}).items():
        yield from tables.format_groups(column, groups, problem_type)
    if "robustness" in measured:
        yield from tables.format_robustness(measured["robustness"])
    if "ood" in measured:
        yield from tables.format_separations(measured["ood"])


def run(argv: Sequence[str]) -> int:
    """Measure a trained model."""
    words, values = read_words(parser(), argv, keys(), _check)

    with quick_imports():
        from hf_transfer.data.labels import REGRESSION
        from hf_transfer.evaluation.measure import format_metrics
        from hf_transfer.files import as_json, write_text
        from hf_transfer.inference.predictor import Predictor
        from hf_transfer.inference.reviewing import errors_csv

    own = ("label_column_name", *(f.name for f in (*fields(InputArguments), *fields(Views))))
    predictor = Predictor.load(
        words[0],
        model_revision=values["revision"],
        allow_pickle=values["allow_pickle"],
        **{name: values[name] for name in own},
    )
    others = ("test_file", "dataset_name", "dataset_config_name")
    is_other = values["test_file"] or values["dataset_name"]
    data = predictor.other_data(**{name: values[name] for name in others}) if is_other else None
    wanted = (data, values["split"], values["max_predict_samples"])
    more = {f.name: values[f.name] for f in fields(Examining)}
    if values["errors_file"]:
        measured, frame = predictor.evaluate_with_errors(*wanted, **more)
        write_text(Path(values["errors_file"]), errors_csv(frame))
        what = "answers" if predictor.labels.problem_type == REGRESSION else "wrong answers"
        note = f"{len(frame):,} {what} written to {values['errors_file']}, without the nearest training examples"
        measured["notes"].append(f"{note}, which only the {ERRORS} of a run has.")
    else:
        measured = predictor.evaluate(*wanted, **more)
    if values["json"]:
        print(json.dumps(as_json(measured)))
    else:
        split = f"{measured['metrics_split']} of {measured['dataset']}"
        print(f"{words[0]} on {split} ({measured['num_examples']:,} examples):")
        print("\n".join(f"  Note: {note}" for note in measured["notes"]), end="\n" if measured["notes"] else "")
        print("\n".join(format_metrics(measured["metrics"], measured["intervals"])))
        for line in _details(measured, predictor.labels.problem_type):
            print(line)
        if measured.get("clipped_images"):
            print(f"Images with values beyond the training range, which were clipped: {measured['clipped_images']:,}")
    return 0
