"""The verbs: each one's keys, what it does, and how it answers."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer.config.arguments.views import Views
from hf_transfer.config.fields import setting
from hf_transfer.errors import UserError, UserErrors, WorkFailed

if TYPE_CHECKING:
    from hf_transfer.config.fields import Key


# ---- keys of the verbs that are no keys of a run -------------------------------------------------------------------


@dataclass
class OutputArguments:
    """How much is said. Every verb has these."""

    quiet: bool = setting(False, "say nothing but errors")
    verbose: bool = setting(False, "let the libraries speak too")
    debug: bool = setting(False, "show the traceback of an error")


@dataclass
class InputArguments:
    """How inputs are read."""

    text_column_name: str | list[str] | None = setting(
        None, "text column of a table, or two for a pair (default: the run's)"
    )
    image_column_name: str | None = setting(
        None, "column of a table that holds images or their paths (default: the run's)"
    )
    per_device_eval_batch_size: int | None = setting(None, "examples per forward pass (default: the run's)")
    trust_remote_code: bool = setting(False, "run code from the model's repository")


@dataclass
class PredictArguments:
    """What is answered, and where."""

    output: str | None = setting(None, "file for the answers, written when all are there (default: standard output)")
    top_k: int | None = setting(
        None, "only so many scores, the highest first (default: all, in the order of the labels)"
    )
    features: bool = setting(False, "add the pooled feature vector that the head receives")


@dataclass
class EvaluateArguments:
    """What is evaluated on."""

    test_file: str | None = setting(None, "CSV, JSON or Parquet file with labels")
    dataset_name: str | None = setting(
        None, "hub id, image folder, file or folder, save_to_disk folder, or bundled:<name>"
    )
    dataset_config_name: str | None = setting(None, "the hub data set's configuration")
    split: str | None = setting(None, "split of the data (default: test, else validation, else the only one)")
    label_column_name: str | list[str] | None = setting(
        None, "label column, or several of 0 and 1 (default: the run's, label, labels, or the only class column)"
    )
    max_predict_samples: int | None = setting(None, "examples to evaluate on, drawn by class (default: all)")
    json: bool = setting(False, "print one JSON object instead of lines")


@dataclass
class PushArguments:
    """What is pushed, and where to."""

    hub_model_id: str | None = setting(None, "owner/name, or a name of one's own (default: the name of RUN's folder)")
    merged: bool = setting(False, "push a plain model, the adapter in its weights")
    revision: str | None = setting(None, "branch, made where there is none (default: main)")
    commit_message: str | None = setting(None, "message of the commit")
    private: bool = setting(False, "make the repository private, which is the default")
    public: bool = setting(False, "make the repository public")


@dataclass
class PlanVerbArguments:
    """How a plan is shown."""

    json: bool = setting(False, "print one JSON object instead of tables")
    preview: str | None = setting(None, "picture of augmented training images to write: .png, .svg or .pdf")
    depth_map: str | None = setting(None, "picture of groups, epochs and rates to write: .png, .svg or .pdf")


@dataclass
class TrainArguments:
    """What `train` does instead of training."""

    print_config: bool = setting(False, "print a YAML file of all keys with their help, and end")


def _keys(*sections: tuple[str, type]) -> dict[str, Key]:
    from hf_transfer.config.fields import keys_of

    return {
        name: k for topic, cls in (*sections, ("messages", OutputArguments)) for name, k in keys_of(cls, topic).items()
    }


# ---- verbs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        summary: a line for the list of verbs.
        run: from arguments to an exit code.
        parser: makes the parser of its arguments, for `--help` and for completion.
    """

    summary: str
    run: Callable[[Sequence[str]], int]
    parser: Callable[[], argparse.ArgumentParser]


def _run_parser(verb: str, summary: str, own: type) -> argparse.ArgumentParser:
    """All keys of a run, and the verb's own."""
    from hf_transfer.config.command_line import add_keys
    from hf_transfer.settings import parser

    made = parser(f"hf-transfer {verb}", summary)
    add_keys(made, _keys(("instead" if verb == "train" else "shown", own)))
    return made


def _read_run(
    verb: str, argv: Sequence[str], parser: argparse.ArgumentParser, own: type
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]:
    """(keys of the file, keys given, the verb's own values, problems)."""
    from hf_transfer.config.command_line import parse_options
    from hf_transfer.config.values import coerce, read_config_file
    from hf_transfer.settings import keys

    owned = _keys(("", own))
    given, problems = parse_options(parser, argv, {**keys(), **owned})
    values = {name: coerce(given.pop(name, k.default), k) for name, k in owned.items()}
    path = given.pop("config", None)
    if isinstance(path, list):
        raise UserError(f"--config takes one file, not {len(path)}.")
    level = "error" if values["quiet"] else "info" if values["verbose"] else None
    if level:
        given.setdefault("log_level", level)
    return read_config_file(path) if path else {}, given, values, problems


def _train_parser() -> argparse.ArgumentParser:
    return _run_parser("train", "Fine-tune a pretrained model on a data set.", TrainArguments)


def train(argv: Sequence[str]) -> int:
    """Run a recipe."""
    from hf_transfer.settings import Config, to_commented_yaml

    file, given, values, problems = _read_run("train", argv, _train_parser(), TrainArguments)
    if values["print_config"]:
        if problems:
            raise UserErrors(problems)
        print(to_commented_yaml({**file, **given}), end="")
        return 0
    config = Config.from_sources(file, given, problems)

    import torch

    from hf_transfer.runs.run import run

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"hf_transfer\.run$")  # that a push failed is raised here
        result = run(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads abort a process that ends without this, now and then
    if result.push_error is not None:
        raise result.push_error
    return 0


PLAN_HELP = (
    "What a run would do, with the keys of train: each stage, and each layer group's rate in it. Trains nothing and "
    "writes nothing. Without data, the model alone is planned for."
)


def _plan_parser() -> argparse.ArgumentParser:
    return _run_parser("plan", PLAN_HELP, PlanVerbArguments)


def plan(argv: Sequence[str]) -> int:
    """Show what a run would do."""
    import json

    from hf_transfer.report.depth_map import check_picture
    from hf_transfer.settings import Config

    file, given, values, problems = _read_run("plan", argv, _plan_parser(), PlanVerbArguments)
    if values["depth_map"]:
        check_picture(values["depth_map"])
    if values["preview"]:
        from hf_transfer.data.preview import check_preview

        check_preview(values["preview"])
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes its folder
        config = Config.from_sources(file, {**given, "output_dir": folder}, problems, needs=("model",))

        from hf_transfer.runs.preview import plan_only

        found = plan_only(config, talks=not (values["json"] or values["quiet"]), preview=values["preview"])
    if values["json"]:
        print(json.dumps(found.to_dict(), indent=2))
    if values["depth_map"]:
        found.depth_map.draw(values["depth_map"])
    return 0


def _words_parser(verb: str, words: str, description: str, keys: Mapping[str, Key]) -> argparse.ArgumentParser:
    from hf_transfer.config.command_line import add_keys, make_parser

    made = make_parser(f"hf-transfer {verb}", f"{words} [--key value ...]", description)
    add_keys(made, keys, flags=True)
    return made


def _read_words(
    parser: argparse.ArgumentParser, argv: Sequence[str], keys: Mapping[str, Key]
) -> tuple[list[str], dict[str, Any]]:
    """(words, every key's value).

    Raises:
        UserErrors: all problems of the keys at once.
    """
    from hf_transfer.config.command_line import parse_words

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("This verb runs in one process: call it without `accelerate launch` or torchrun.")
    words, given, problems = parse_words(parser, argv, keys)
    values = {name: given.get(name, k.default) for name, k in keys.items()}
    problems += [
        f"--{name}: {values[name]} is not positive."
        for name in ("top_k", "per_device_eval_batch_size", "max_predict_samples")
        if values.get(name) is not None and values[name] <= 0
    ]
    if problems:
        raise UserErrors(problems)
    _set_library_messages(values["quiet"], values["verbose"])
    return words, values


def _set_library_messages(quiet: bool, verbose: bool) -> None:
    """Standard output belongs to the answers: bars and notices of the libraries only when asked for."""
    import datasets
    from transformers import logging

    if verbose:
        logging.set_verbosity_info()
        return
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    if quiet:
        logging.set_verbosity_error()


PREDICT_SECTIONS = (("answers", PredictArguments), ("inputs", InputArguments), ("looks", Views))
PREDICT_HELP = (
    "Answer each INPUT with a line of JSON, in order. INPUT is a text, an image, a .txt file of lines, a CSV, TSV, "
    "JSON, JSONL or Parquet file, a folder of such files, or - for lines of standard input. RUN is the folder of a run "
    "or of any saved model, or a hub id. Words after -- are inputs even where they begin with a dash."
)


def _predict_parser() -> argparse.ArgumentParser:
    return _words_parser("predict", "RUN INPUT...", PREDICT_HELP, _keys(*PREDICT_SECTIONS))


def predict(argv: Sequence[str]) -> int:
    """Answer inputs. 1 where one of them could not be read."""
    import json

    words, values = _read_words(_predict_parser(), argv, _keys(*PREDICT_SECTIONS))
    if len(words) < 2:
        raise UserError(
            "RUN and INPUT are needed: a run's folder or hub id, then texts, files, folders or -.", _help("predict")
        )
    run, *inputs = words
    if values["output"]:
        _check_output(Path(values["output"]))

    from tqdm.auto import tqdm

    from hf_transfer.evaluation.measure import finite
    from hf_transfer.inference.predictor import Predictor

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is, whatever the terminal's own
    predictor = Predictor.load(run, **{f.name: values[f.name] for f in (*fields(InputArguments), *fields(Views))})
    wrong, count = [], 0
    shown = values["output"] is not None or not sys.stdout.isatty()  # a bar between answers would spoil them
    answers = predictor.stream(predictor.read(inputs), values["top_k"], values["features"])
    bar = tqdm(answers, unit=" inputs", disable=not shown or values["quiet"] or not sys.stderr.isatty())
    with _writer(values["output"]) as write, bar:
        for answer in bar:
            count += 1
            wrong += [answer] if "error" in answer else []
            write(json.dumps(finite(answer), ensure_ascii=False, default=str))
    if wrong:
        first = f"{wrong[0]['input']!r}: {wrong[0]['error']}"
        raise WorkFailed(
            f"{len(wrong)} of {count} inputs could not be read; the first is {first}.",
            "Their answers hold `error`.",
        )
    return 0


EVALUATE_SECTIONS = (("data", EvaluateArguments), ("inputs", InputArguments), ("looks", Views))
EVALUATE_HELP = (
    "Metrics of a trained model on labelled data, with 95% intervals; by default on what the run held out. RUN is the "
    "folder of a run or of any saved model, or a hub id."
)


def _evaluate_parser() -> argparse.ArgumentParser:
    return _words_parser("evaluate", "RUN [--test_file F | --dataset_name D]", EVALUATE_HELP, _keys(*EVALUATE_SECTIONS))


def evaluate(argv: Sequence[str]) -> int:
    """Measure a trained model."""
    import json

    words, values = _read_words(_evaluate_parser(), argv, _keys(*EVALUATE_SECTIONS))
    if len(words) != 1:
        raise UserError(f"One RUN is needed, a run's folder or hub id; {len(words)} were given.", _help("evaluate"))
    if values["test_file"] and values["dataset_name"]:
        raise UserError("test_file and dataset_name contradict each other: keep one.")

    if values["dataset_config_name"] and not values["dataset_name"]:
        raise UserError("dataset_config_name: it belongs to a dataset_name, and none is given.")

    from hf_transfer.evaluation.measure import finite, format_metrics
    from hf_transfer.inference.predictor import Predictor

    own = ("label_column_name", *(f.name for f in (*fields(InputArguments), *fields(Views))))
    predictor = Predictor.load(words[0], **{name: values[name] for name in own})
    others = ("test_file", "dataset_name", "dataset_config_name")
    is_other = values["test_file"] or values["dataset_name"]
    data = predictor.other_data(**{name: values[name] for name in others}) if is_other else None
    found = predictor.evaluate(data, values["split"], values["max_predict_samples"])
    if values["json"]:
        print(json.dumps(finite(found)))
    else:
        print(f"{words[0]} on {found['metrics_split']} of {found['dataset']} ({found['num_examples']:,} examples):")
        print("\n".join(format_metrics(found["metrics"], found["intervals"])))
    return 0


PUSH_HELP = (
    "Push a finished run to the hub that HF_ENDPOINT names: its model or adapter, labels, tokenizer or image processor "
    "and card. RUN is the folder of a run. Who pushes is said by HF_TOKEN or by `hf auth login`."
)


def _push_parser() -> argparse.ArgumentParser:
    return _words_parser("push", "RUN --hub_model_id OWNER/NAME", PUSH_HELP, _keys(("push", PushArguments)))


def push(argv: Sequence[str]) -> int:
    """Push a run to a hub."""
    words, values = _read_words(_push_parser(), argv, _keys(("push", PushArguments)))
    if len(words) != 1:
        raise UserError(f"One RUN is needed, a run's folder; {len(words)} were given.", _help("push"))
    if values["private"] and values["public"]:
        raise UserError("private and public contradict each other: keep one.")

    from hf_transfer.hub.push import Target
    from hf_transfer.hub.push import push as push_run

    private = False if values["public"] else True if values["private"] else None
    own = ("hub_model_id", "merged", "revision", "commit_message")
    done = push_run(words[0], Target(**{name: values[name] for name in own}, private=private))
    if not values["quiet"]:
        print("\n".join(done.lines()))
    return 0


DOCTOR_HELP = (
    "What is installed, what the machine has, what is wrong and how to mend it. Exit code 1 where something is wrong. "
    "EXTRA names extras that must be there: vision, quickstart, onnx, demo, track, hpo."
)


def _doctor_parser() -> argparse.ArgumentParser:
    return _words_parser("doctor", "[EXTRA...]", DOCTOR_HELP, _keys())


def doctor(argv: Sequence[str]) -> int:
    """Examine the installation."""
    from hf_transfer.cli.doctor import NOTE, OK, WRONG, examine
    from hf_transfer.config.command_line import parse_words

    words, values, problems = parse_words(_doctor_parser(), argv, _keys())
    if problems:
        raise UserErrors(problems)
    counts = dict.fromkeys((OK, NOTE, WRONG), 0)
    for check in examine(words):
        counts[check.state] += 1
        if check.state == WRONG or not values.get("quiet"):
            print(check, flush=True)
    if not values.get("quiet"):
        print("Everything is in order." if not counts[WRONG] else f"{counts[WRONG]} to mend.")
    return 1 if counts[WRONG] else 0


# ---- details -----------------------------------------------------------------------------------------------------


def _help(verb: str) -> str:
    return f"`hf-transfer {verb} --help` shows them."


def _check_output(path: Path) -> None:
    """Raises:
    UserError: the file cannot be made where it should be.
    """
    if path.is_dir():
        raise UserError(f"output: {str(path)!r} is a folder, not a file.")
    if not path.parent.is_dir():
        raise UserError(f"output: there is no folder {str(path.parent)!r}.")
    if not os.access(path.parent, os.W_OK):
        raise WorkFailed(f"output: {str(path.parent)!r} cannot be written to.", "Choose another folder.")


@contextmanager
def _writer(output: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line: at once to standard output, or to a file that appears when it is whole."""
    if output is None:
        yield lambda line: print(line, flush=True)
        return
    path = Path(output).resolve()  # a link stays one
    if path.exists() and not path.is_file():  # a device or a pipe: nothing to replace
        with path.open("w", encoding="utf-8") as file:
            yield lambda line: print(line, file=file, flush=True)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".predict-") as folder:
        beside = Path(folder) / "answers"
        with beside.open("w", encoding="utf-8") as file:
            yield lambda line: print(line, file=file)
        beside.replace(path)


VERBS: dict[str, Verb] = {
    "train": Verb("fine-tune a pretrained model on a data set", train, _train_parser),
    "plan": Verb("what a run would do to each layer, when and how fast; trains nothing", plan, _plan_parser),
    "predict": Verb("answer texts, images, files and folders with JSON lines", predict, _predict_parser),
    "evaluate": Verb("metrics of a trained model on labelled data", evaluate, _evaluate_parser),
    "push": Verb("a run's model or adapter, labels and card to a hub", push, _push_parser),
    "doctor": Verb("what is installed, what is wrong, and how to mend it", doctor, _doctor_parser),
}
