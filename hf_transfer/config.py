"""Keys: one flat namespace for YAML, the command line and Python.

Every key is a field of one of three dataclasses, which hold its default and its help text: `ModelArguments`,
`DataArguments` and `TransferArguments`. Values from all three sources go through the same `coerce`; precedence is
default < YAML < command line; all problems are collected and raised together.
"""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

import yaml
from transformers import TrainingArguments

from .errors import UserError, UserErrors, nearest
from .keys import Key, coerce, enum_values
from .strategies import STRATEGIES, PlanArguments, check, key
from .trainer import TransferArguments


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = key(None, "hub id, local folder, timm/<name>, or bundled:<name>")
    model_revision: str = key("main", "branch, tag or commit on the hub")
    from_scratch: bool = key(False, "random weights in the checkpoint's architecture")
    trust_remote_code: bool = key(False, "run code from the model's repository (command line only)")
    allow_pickle: bool = key(False, "also load weights that are not safetensors (command line only)")


@dataclass
class DataArguments:
    """Which data, and how it is read."""

    task: str | None = key(None, "image-classification or text-classification (default: seen from the data)")
    problem_type: str | None = key(
        None,
        "default: seen from the labels",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    dataset_name: str | None = key(
        None, "hub id, image folder, CSV/JSON/Parquet file or folder, save_to_disk folder, or bundled:<name>"
    )
    dataset_config_name: str | None = key(None, "the hub data set's configuration")
    train_file: str | None = key(None, "CSV, JSON or Parquet file to train on")
    validation_file: str | None = key(None, "file to validate on")
    test_file: str | None = key(None, "file to test on; never used for selection")
    text_column_name: str | list[str] | None = key(None, "text column, or two for a pair (default: the only one)")
    image_column_name: str | None = key(None, "image column (default: the only one)")
    label_column_name: str | None = key(None, "label column (default: label, labels, or the only class column)")
    train_val_split: float = key(0.1, "share of the training set that validates where there is no validation split")
    max_train_samples: int | None = key(None, "examples to train on, drawn by class")
    max_eval_samples: int | None = key(None, "examples to validate on, drawn by class")
    max_predict_samples: int | None = key(None, "examples to test on, drawn by class")
    max_seq_length: int | None = key(None, "tokens kept of a text (default: what the model can read)")
    image_size: int | None = key(None, "pixels of the square input (default: the checkpoint's own)")
    overwrite_output_dir: bool = key(False, "write into an output_dir that holds a finished run")


# What `hf-transfer train` and `fine_tune` start from, where it differs from TransferArguments. A fine-tuning run wants
# to be watched and to be resumable; TransferArguments keeps Trainer's defaults, as a drop-in must.
RUN_DEFAULTS: dict[str, Any] = {
    "strategy": "auto",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 0.05,
    "remove_unused_columns": False,  # the task prepares exactly what the model reads
}
LINEAR_PROBE_LEARNING_RATE = 1e-3  # a lone head wants a higher rate than a backbone
COMMAND_LINE_ONLY = ("trust_remote_code", "allow_pickle")
# Settable in Python only, or by the launcher; and `hub_token`, which would end up in files.
_NOT_KEYS = (
    "parallelism_config",
    "local_rank",
    "hub_token",
    "do_train",
    "do_eval",
    "do_predict",
    "debug",
    "remove_unused_columns",
    "label_names",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
)
_SECTIONS: tuple[tuple[str, type], ...] = (
    ("model", ModelArguments),
    ("data", DataArguments),
    ("training", TransferArguments),
)


@cache
def keys() -> dict[str, Key]:
    """All keys, in the order of the dataclasses."""
    found: dict[str, Key] = {}
    theirs = _trainers_docs()
    for section, cls in _SECTIONS:
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            if not f.init or f.name in _NOT_KEYS:
                continue
            default = (
                f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None
            )
            choices = f.metadata.get("choices", ()) or enum_values(hints[f.name])
            if f.name == "strategy":
                choices = tuple(STRATEGIES)
            found[f.name] = Key(
                f.name,
                section,
                hints[f.name],
                RUN_DEFAULTS.get(f.name, default),
                str(f.metadata.get("help") or theirs.get(f.name, "")).rstrip("."),
                tuple(choices),
            )
    return found


def _trainers_docs() -> dict[str, str]:
    """The first sentence on each of `TrainingArguments`' fields: they are documented in its docstring only."""
    entries = re.findall(r"^ +(\w+) \(`[^\n]*\):\n +([^\n]+)", TrainingArguments.__doc__ or "", flags=re.MULTILINE)
    return {name: text.split(". ")[0].rstrip(".:") for name, text in entries}


class _Help(argparse.HelpFormatter):
    """`--key VALUE`, although a key may take several words or none."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return action.metavar if isinstance(action.metavar, str) else ""


def parse_command_line(argv: Sequence[str], prog: str = "hf-transfer train") -> tuple[dict[str, Any], list[str]]:
    """(raw values by key, with `config` among them; problems) of `--key value` arguments. Prints `--help` and exits."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--key value ...]",
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", nargs="*", metavar="FILE", help="YAML file of keys; the command line comes before it"
    )
    plan = {f.name for f in fields(PlanArguments)}
    sections = {name: parser.add_argument_group(name) for name in ("model", "data", "plan", "training")}
    for entry in keys().values():
        choices = f" ({', '.join(entry.choices)})" if entry.choices else ""
        default = "" if entry.default is None else f" [{entry.default}]"
        text = f"{' '.join(entry.help.split())}{choices}{default}".replace("%", "%%")
        sections["plan" if entry.name in plan else entry.section].add_argument(
            f"--{entry.name}", nargs="*", metavar="VALUE", help=text
        )
    known, extra = parser.parse_known_args(_attach_numbers(argv))
    problems, previous = [], ""
    for token in extra:
        if token.startswith("--"):
            name = token[2:].split("=")[0]
            problems.append(_unknown(name, "--"))
        elif not previous.startswith("--"):
            problems.append(f"{token!r} is not a key; keys are written --key value.")
        previous = token
    values: dict[str, Any] = {}
    for name, tokens in vars(known).items():
        if len(tokens) == 1:
            values[name] = tokens[0]
        elif tokens:
            values[name] = tokens
        elif name in keys() and bool in keys()[name].types:
            values[name] = True
        else:
            problems.append(f"--{name} needs a value.")
    return values, problems


def _attach_numbers(argv: Sequence[str]) -> list[str]:
    """`--key -1e-3` as `--key=-1e-3`: argparse takes a negative number with an exponent for an option."""
    joined: list[str] = []
    for token in argv:
        if token.startswith("-") and _is_float(token) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown(name: str, dashes: str = "") -> str:
    if name == "hub_token":
        return "hub_token is not a key, so that it ends up in no file: set HF_TOKEN, or run `hf auth login`."
    return f"{dashes}{name} is not a key.{nearest(name, keys())}"


# ---- the configuration ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """A checked configuration.

    Attributes:
        model, data, training: the three groups of keys.
        values: every key with its value, flat.
    """

    model: ModelArguments
    data: DataArguments
    training: TransferArguments
    values: dict[str, Any]

    @classmethod
    def from_sources(cls, file: Mapping[str, Any], given: Mapping[str, Any], problems: Sequence[str] = ()) -> Config:
        """Merge defaults, a file's keys and keys given on the command line or in Python.

        Raises:
            UserErrors: every unknown key, wrong value and contradiction, in one message.
        """
        found, rejected = list(problems), set[str]()
        values: dict[str, Any] = {}
        for source, origin in ((file, "in the file"), (given, "")):
            for name, raw in source.items():
                if name not in keys():
                    found.append(_unknown(name))
                elif origin and name in COMMAND_LINE_ONLY and raw:
                    found.append(f"{name} cannot be set in a file, only on the command line.")
                else:
                    try:
                        values[name] = coerce(raw, keys()[name])
                    except ValueError as error:
                        found.append(f"{name}: {error}")
                        rejected.add(name)
        chosen = dict(values)
        values = {name: chosen.get(name, key.default) for name, key in keys().items()}
        plan = PlanArguments(**{f.name: values[f.name] for f in fields(PlanArguments)})
        found += [
            *_missing(values, rejected),
            *_contradictions(values, chosen),
            *_out_of_range(values),
            *check(plan),
        ]
        if found:
            raise UserErrors(found)
        if values["stages"] is not None:
            values["num_train_epochs"] = float(sum(s["epochs"] for s in values["stages"]))
        values["from_scratch"] |= values["strategy"] == "scratch"
        if "learning_rate" not in chosen and values["strategy"] == "linear-probe":
            values["learning_rate"] = LINEAR_PROBE_LEARNING_RATE
        model, data, training = (_build(section, values) for _, section in _SECTIONS)
        return cls(model, data, training, values)

    def to_yaml(self) -> str:
        """A file that repeats this run; keys that a file may not hold stand in a comment."""
        values = {
            k: v
            for k, v in self.values.items()
            if k not in (*COMMAND_LINE_ONLY, "resume_from_checkpoint", "overwrite_output_dir")
        }
        only = [f"--{k}" for k in COMMAND_LINE_ONLY if self.values[k]]
        note = f"# The run was also given, on the command line only: {' '.join(only)}\n" if only else ""
        head = "# Repeats this run: hf-transfer train --config run.yaml --output_dir again\n"
        return head + note + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _build(section: type, values: Mapping[str, Any]) -> Any:
    own = {f.name: values[f.name] for f in fields(section) if f.init and f.name in values}
    if section is TransferArguments:
        own |= {"remove_unused_columns": RUN_DEFAULTS["remove_unused_columns"]}
    try:
        return section(**own)
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from error


def _missing(values: Mapping[str, Any], rejected: Collection[str]) -> list[str]:
    """Keys that every run needs; one whose value was refused is not missing."""
    found = []
    values = {**values, **dict.fromkeys(rejected, "given")}
    if not values["model_name_or_path"]:
        found.append("model_name_or_path is missing: a hub id, a folder, timm/<name> or bundled:<name>.")
    if not values["output_dir"]:
        found.append("output_dir is missing: the folder that the run is written to.")
    if not values["dataset_name"] and not values["train_file"]:
        found.append("dataset_name or train_file is missing: what to train on.")
    return found


def _contradictions(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    """Keys that exclude each other, and a task that does not exist."""
    from .tasks import TASKS  # a task's module imports this one

    found = []
    if values["task"] is not None and values["task"] not in TASKS:
        found.append(f"task: {values['task']!r} is not one of {', '.join(TASKS)}.{nearest(values['task'], TASKS)}")
    for one, other in (("dataset_name", "train_file"), ("fp16", "bf16")):
        if values[one] and values[other]:
            found.append(f"{one} and {other} contradict each other: keep one.")
    if chosen.get("from_scratch") is False and values["strategy"] == "scratch":
        found.append("from_scratch: false contradicts strategy: scratch, which is training from random weights.")
    if chosen.get("stages") is not None:
        total = sum(
            float(s["epochs"]) for s in chosen["stages"] if isinstance(s, Mapping) and _is_epochs(s.get("epochs"))
        )
        if "num_train_epochs" in chosen and chosen["num_train_epochs"] != total:
            found.append(
                f"num_train_epochs: {chosen['num_train_epochs']:g} contradicts stages, which last {total:g} epochs; "
                "leave num_train_epochs out."
            )
    return found


def _is_epochs(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_POSITIVE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_train_samples",
    "max_eval_samples",
    "max_predict_samples",
    "max_seq_length",
    "image_size",
)


def _out_of_range(values: Mapping[str, Any]) -> list[str]:
    found = [
        f"{name}: {values[name]:g} is not positive."
        for name in _POSITIVE
        if values[name] is not None and not values[name] > 0
    ]
    found += [
        f"{name}: {values[name]:g} is negative."
        for name in ("learning_rate", "weight_decay", "warmup_steps", "logging_steps", "seed")
        if not values[name] >= 0
    ]
    if not 0 < values["train_val_split"] < 1:
        found.append(f"train_val_split: {values['train_val_split']:g} is not a share between 0 and 1.")
    return found
