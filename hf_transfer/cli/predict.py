"""`hf-transfer predict`."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_transfer.cli.imports import quick_imports
from hf_transfer.cli.words import (
    AbstainArguments,
    InputArguments,
    RunArguments,
    check_coverage,
    help_of,
    keys_with,
    read_words,
    words_parser,
)
from hf_transfer.config.arguments.explaining import Explaining
from hf_transfer.config.arguments.views import Views
from hf_transfer.config.fields import Key, setting
from hf_transfer.config.places import check_input, check_run
from hf_transfer.errors import UserError, WorkFailed

HELP = (
    "Answer each INPUT with a line of JSON, in order. INPUT is a text, an image, a .txt file of lines, a CSV, TSV, "
    "JSON, JSONL or Parquet file, a folder of such files, or - for lines of standard input. RUN is the folder of a run "
    "or of any saved model, or a hub id. Words after -- are inputs even where they begin with a dash."
)


@dataclass
class PredictArguments:
    """What is answered, and where."""

    output: str | None = setting(
        None,
        "file for the answers, written when all are there: .jsonl, or .csv or .parquet with a column score_<label> for "
        "each label (default: standard output)",
    )
    top_k: int | None = setting(
        None, "only so many scores, the highest first (default: all, in the order of the labels)"
    )
    features: bool = setting(False, "add the pooled feature vector that the head receives")


LINES = ".jsonl"
FORMATS = (".csv", LINES, ".parquet")  # of --output

SECTIONS = (
    ("answers", PredictArguments),
    ("answers", AbstainArguments),
    ("why", Explaining),
    ("inputs", InputArguments),
    ("run", RunArguments),
    ("views", Views),
)


def keys() -> dict[str, Key]:
    return keys_with(*SECTIONS)


def parser() -> argparse.ArgumentParser:
    return words_parser("predict", "RUN INPUT...", HELP, keys())


def _check(words: list[str], values: dict[str, Any]) -> None:
    """Raises:
    UserError: what is typed is wrong.
    """
    if len(words) < 2:
        raise UserError(
            "RUN and INPUT are needed: a run's folder or hub id, then texts, files, folders or -.", help_of("predict")
        )
    folder, *inputs = words
    check_run(folder)
    for word in inputs:
        check_input(word)
    _check_coverage(values, inputs)
    if values["output"]:
        _check_output(Path(values["output"]))
    _explaining(values).check(looks_often=Views.of(values).several)


def _explaining(values: dict[str, Any]) -> Explaining:
    return Explaining(**{f.name: values[f.name] for f in fields(Explaining)})


def run(argv: Sequence[str]) -> int:
    """Answer inputs. 1 where one of them could not be read."""
    words, values = read_words(parser(), argv, keys(), _check)
    folder, *inputs = words

    with quick_imports():
        from tqdm.auto import tqdm

        from hf_transfer.evaluation.conformal import COVERAGE
        from hf_transfer.files import as_json
        from hf_transfer.inference.inputs import arrive_slowly
        from hf_transfer.inference.predictor import Predictor

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is, whatever the terminal's own
    own = {f.name: values[f.name] for f in (*fields(InputArguments), *fields(Views))}
    predictor = Predictor.load(folder, model_revision=values["revision"], allow_pickle=values["allow_pickle"], **own)
    wrong, count = [], 0
    shown = values["output"] is not None or not sys.stdout.isatty()  # a bar between answers would spoil them
    if values["abstain"]:
        predictor = predictor.abstaining(values["coverage"] or COVERAGE)
    waits = not arrive_slowly(inputs)
    more = None
    if values["explain"]:
        from hf_transfer.inference.explanation_files import Writer

        more = Writer(predictor.explainer(values["explain_label"]), Path(values["explain"]))
    answers = predictor.stream(predictor.read(inputs), values["top_k"], values["features"], waits, more)
    bar = tqdm(answers, unit=" inputs", disable=not shown or values["quiet"] or not sys.stderr.isatty())
    with _writer(values["output"], predictor.labels.names) as write, bar:
        for answer in bar:
            count += 1
            wrong += [answer] if "error" in answer else []
            write(json.dumps(as_json(answer), ensure_ascii=False))
    if wrong:
        first = f"{wrong[0]['input']!r}: {wrong[0]['error']}"
        raise WorkFailed(
            f"{len(wrong)} of {count} inputs could not be read; the first is {first.rstrip('.')}.",
            "Their answers hold `error`.",
        )
    if values["output"] and not values["quiet"] and not _is_special(Path(values["output"])):
        sys.stderr.write(f"{count:,} answer{'' if count == 1 else 's'} written to {values['output']}.\n")
    if more and not values["quiet"]:
        sys.stderr.write(f"{more.count:,} explanation{'' if more.count == 1 else 's'} in {values['explain']}.\n")
    return 0


def _check_coverage(values: dict[str, Any], inputs: Sequence[str]) -> None:
    """Raises:
    UserError: `coverage` is out of range, stands without `abstain`, or as a word.
    """
    check_coverage(values)
    number = next((word for word in inputs if re.fullmatch(r"0?\.\d+", word)), None)
    if values["abstain"] and number and not Path(number).exists():
        raise UserError(
            f"abstain: {number!r} stands among the inputs, and --abstain takes no value.",
            f"Write --abstain --coverage {number}.",
        )


def _check_output(path: Path) -> None:
    """Raises:
    UserError: the file cannot be made where it should be, or its name does not say what it is to hold.
    """
    if path.is_dir():
        raise UserError(f"output: {str(path)!r} is a folder, not a file.")
    if not _is_special(path) and path.suffix.lower() not in FORMATS:
        raise UserError(f"output: {str(path)!r} does not end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    if not path.parent.is_dir():
        raise UserError(f"output: there is no folder {str(path.parent)!r}.")
    if not os.access(path.parent, os.W_OK):
        raise WorkFailed(f"output: {str(path.parent)!r} cannot be written to.", "Choose another folder.")


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, also one that a shell has redirected to a file, as it may /dev/stderr."""
    return path.parts[:2] == ("/", "dev") or (path.exists() and not path.is_file())


@contextmanager
def _writer(output: str | None, names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """A function that writes a line: at once to standard output, or to a file that appears when it is whole."""
    if output is None:
        yield lambda line: print(line, flush=True)
        return
    if _is_special(Path(output)):  # nothing to replace
        with Path(output).open("a", encoding="utf-8") as file:
            yield lambda line: print(line, file=file, flush=True)
        return
    path = Path(output).resolve()  # a link stays one
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".predict-") as folder:
        beside = Path(folder) / "answers"
        with beside.open("w", encoding="utf-8") as file:
            yield lambda line: print(line, file=file)
        if (form := Path(output).suffix.lower()) != LINES:
            from hf_transfer.inference.answer_files import write_table

            table = Path(folder) / "table"
            write_table(beside, table, names, form)
            beside = table
        beside.replace(path)
