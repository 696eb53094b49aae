"""What the verbs share: keys that belong to no run, and how words and keys are read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.command_line import NotAKey, add_keys, make_parser, parse_run, parse_words
from hf_transfer.config.fields import Key, keys_of, setting, settings_of, wrong_values
from hf_transfer.config.places import check_places, installed_model, kind_of_data
from hf_transfer.config.values import coerce, read_config_file
from hf_transfer.data.header import check_header
from hf_transfer.errors import UserError, UserErrors, option
from hf_transfer.files import say


@dataclass
class OutputArguments:
    """How much is said. Every verb has these."""

    quiet: bool = setting(False, "say nothing but errors")
    verbose: bool = setting(False, "let the libraries speak too")
    debug: bool = setting(False, "show the traceback of an error")


@dataclass
class ColumnArguments:
    """Which columns of a table are read."""

    text_column_name: str | list[str] | None = setting(
        None, "text column of a table, or two for a pair (default: the run's)"
    )
    image_column_name: str | None = setting(
        None, "column of a table that holds images or their paths (default: the run's)"
    )


@dataclass
class UseArguments:
    """How a trained model is used."""

    pixel_range: list[float] | None = setting(
        None, "lowest and highest value of float and 32-bit images (default: the run's)"
    )
    per_device_eval_batch_size: int | None = setting(None, "examples per forward pass (default: the run's)")
    trust_remote_code: bool = setting(False, "run code from the model's repository")


@dataclass
class InputArguments(UseArguments, ColumnArguments):
    """How inputs are read."""


@dataclass
class AbstainArguments:
    """Sets of labels."""

    abstain: bool = setting(
        False,
        "add the set of labels that contains the true one with the probability --coverage; label and score are null "
        "unless it has exactly one",
    )
    coverage: float | None = setting(None, "of --abstain, above 0 and below 1 (default: 0.9)", above=0, below=1)


def check_coverage(values: Mapping[str, Any]) -> None:
    """Raises:
    UserError: `coverage` is out of range, or stands without `abstain`.
    """
    for problem in wrong_values(values, settings_of(AbstainArguments)):
        raise UserError(problem)
    if values["coverage"] is not None and not values["abstain"]:
        raise UserError("coverage: it has no effect without --abstain.", "Add --abstain.")


def keys_with(*sections: tuple[str, type]) -> dict[str, Key]:
    """The keys of these (heading, class) pairs, and of the output."""
    both = (*sections, ("output", OutputArguments))
    return {name: key for heading, cls in both for name, key in keys_of(cls, heading).items()}


@dataclass
class RunArguments:
    """How a RUN is read."""

    revision: str | None = setting(
        None, "branch, tag or commit of a RUN on a hub (default: main); RUN@REVISION says the same"
    )
    allow_pickle: bool = setting(False, "load weights that are not safetensors, from a source you trust")


# ---- verbs that take the keys of a run ----


def run_parser(verb: str, summary: str, own: type) -> argparse.ArgumentParser:
    """All keys of a run, and the verb's own."""
    from hf_transfer.keys import parser

    options = parser(f"hf-transfer {verb}", summary, words="[MODEL DATA OUT] ")
    add_keys(options, _owned(verb, own))
    return options


def run_keys(verb: str, own: type) -> dict[str, Key]:
    """All keys of a run, and the verb's own."""
    from hf_transfer.keys import keys

    return {**keys(), **_owned(verb, own)}


def _owned(verb: str, own: type) -> dict[str, Key]:
    return keys_with(("instead" if verb == "train" else "shown", own))


def read_run(
    verb: str, argv: Sequence[str], parser: argparse.ArgumentParser, own: type
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]:
    """(keys of the file, keys given, the verb's own values, problems)."""
    owned = _owned(verb, own)
    if "launch" not in owned:
        _refuse_launch(argv)
    given, problems = parse_run(parser, argv, run_keys(verb, own))
    values: dict[str, Any] = {}
    for name, key in owned.items():
        try:
            values[name] = coerce(given.pop(name, key.default), key)
        except ValueError as error:
            values[name] = key.default
            problems.append(f"--{name}: {error}")
    problems += [f"--{said}" for said in wrong_values(values, {name: key.about for name, key in owned.items()})]
    path = given.pop("config", None)
    if isinstance(path, list):
        raise UserError(f"--config takes one file, not {len(path)}.")
    level = "error" if values["quiet"] else "info" if values["verbose"] else None
    if level:
        given.setdefault("log_level", level)
    return read_config_file(path) if path else {}, given, values, problems


def check_run(
    file: Mapping[str, Any], given: dict[str, Any], problems: Sequence[str], needs: Sequence[str], talks: bool
) -> None:
    """Tell every mistake that shows before anything slow is imported, and choose a model where none is named.

    Args:
        file: keys of the file.
        given: keys of the command line, to which the model is added.
        problems: of the command line.
        needs: see `read_values`.
        talks: whether standard output is for lines.

    Raises:
        UserError: the keys are wrong; a file, folder or bundled name does not exist; the price file lacks something.
    """
    from hf_transfer.analysis.prices import read_prices
    from hf_transfer.keys import read_values

    line = _choose_model(file, given, problems)
    values = read_values(file, given, problems, needs).values
    check_places(values)
    check_header(values)
    if values["prices_file"] is not None:
        read_prices(values["prices_file"])
    if line and talks and values["log_level"] not in ("error", "critical") and os.environ.get("RANK", "0") == "0":
        say(line)


def _choose_model(file: Mapping[str, Any], given: dict[str, Any], problems: Sequence[str]) -> str:
    """Add the bundled model that suits the data where no model is named and it is installed.

    Returns:
        What to say of it; empty if nothing was chosen.

    Raises:
        UserError: the data does not exist.
    """
    named = {**file, **given}
    data = str(named.get("dataset_name") or named.get("train_file") or "")
    meant = {said.meant for said in problems if isinstance(said, NotAKey)}
    if not data or named.get("model_name_or_path") or "model_name_or_path" in meant:
        return ""
    places = ("model_name_or_path", "dataset_name", "train_file", "validation_file", "test_file")
    check_places({key: named.get(key) for key in places})
    kind = kind_of_data(data)
    model = installed_model(kind) if kind else ""
    if not model:
        return ""
    given["model_name_or_path"] = model
    language = " (English)" if kind == "text" else ""
    return f"No model given: using {model}{language}, which is installed. {option('model_name_or_path')} names another."


# ---- verbs that take words ----


def words_parser(verb: str, words: str, description: str, keys: Mapping[str, Key]) -> argparse.ArgumentParser:
    options = make_parser(f"hf-transfer {verb}", f"{words} [--key value ...]", description)
    add_keys(options, keys, flags=True)
    return options


def read_words(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    keys: Mapping[str, Key],
    check: Callable[[list[str], dict[str, Any]], None] | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """(words, every key's value).

    Args:
        parser: of the verb.
        argv: what was typed.
        keys: of the verb.
        check: of the words and values, before anything slow is imported; may change them.

    Raises:
        UserErrors: all problems of the keys at once.
        UserError: of `check`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("This verb runs in one process: call it without `accelerate launch` or torchrun.")
    _refuse_launch(argv)
    words, given, problems = parse_words(parser, argv, keys)
    values = {name: given.get(name, k.default) for name, k in keys.items()}
    problems += [
        f"--{name}: expected a positive number, got {values[name]}."
        for name in ("top_k", "per_device_eval_batch_size", "max_predict_samples")
        if values.get(name) is not None and values[name] <= 0
    ]
    if problems:
        raise UserErrors(problems)
    if check:
        check(words, values)
    _set_library_messages(values["quiet"], values["verbose"])
    return words, values


def _refuse_launch(argv: Sequence[str]) -> None:
    """Raises:
    UserError: several processes are asked for.
    """
    for word in argv:
        if word == "--":
            return
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in ("num_processes", "launch"):
            raise UserError(
                "this verb runs in one process; train and find-lr take it.",
                "Leave it out; where the verb has per_device_eval_batch_size, a larger one is quicker on a GPU.",
                key=name,
            )


def _set_library_messages(quiet: bool, verbose: bool) -> None:
    """Standard output belongs to the answers: bars and notices of the libraries only when asked for."""
    import datasets
    from transformers import logging

    from hf_transfer import hub_client

    if verbose:
        logging.set_verbosity_info()
        return
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    if quiet:
        logging.set_verbosity_error()
    hub_client.show_downloads(not quiet)


def help_of(verb: str) -> str:
    return f"`hf-transfer {verb} --help` shows them."
