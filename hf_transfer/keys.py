"""Keys: one flat namespace for YAML, the command line and Python, and what their values alone can tell.

A key is a field of one of the dataclasses in `hf_transfer.config.arguments`, or of transformers' `TrainingArguments`,
whose source is read instead of imported: this module needs no torch, so that a mistake and `--help` take no seconds.
`settings.Config` builds the objects that a run reads.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from hf_transfer.config.arguments import averaging, early_stopping, forgetting, watching
from hf_transfer.config.arguments.adaptation import check as check_adaptation
from hf_transfer.config.arguments.adaptation import check_run as check_adapted_run
from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.config.arguments.averaging import AveragingArguments
from hf_transfer.config.arguments.boundary import BoundaryArguments
from hf_transfer.config.arguments.bucketing import BucketingArguments
from hf_transfer.config.arguments.bucketing import check as check_bucketing
from hf_transfer.config.arguments.calibration import CalibrationArguments
from hf_transfer.config.arguments.data import TASK_NAMES, DataArguments
from hf_transfer.config.arguments.early_stopping import EarlyStoppingArguments
from hf_transfer.config.arguments.forgetting import ForgettingArguments
from hf_transfer.config.arguments.guards import GuardArguments
from hf_transfer.config.arguments.loss import LossArguments
from hf_transfer.config.arguments.loss import check as check_loss
from hf_transfer.config.arguments.machine import MachineArguments
from hf_transfer.config.arguments.model import ModelArguments, check_head
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.config.arguments.schedule import check as check_schedule
from hf_transfer.config.arguments.trainer import INHERITED
from hf_transfer.config.arguments.training import TrainingKeys
from hf_transfer.config.arguments.watching import WatchingArguments
from hf_transfer.config.command_line import NotAKey, add_keys, commented_yaml, make_parser, parse_run, unknown
from hf_transfer.config.contradictions import contradictions, missing
from hf_transfer.config.fields import Key, Setting, keys_of, settings_of, wrong_values
from hf_transfer.config.inherited import training_arguments
from hf_transfer.config.values import coerce
from hf_transfer.errors import UserErrors, nearest
from hf_transfer.plan.checks import check
from hf_transfer.plan.probe_checks import check as check_probe
from hf_transfer.plan.probe_checks import check_run
from hf_transfer.plan.strategies import STRATEGIES
from hf_transfer.run_folder import new_folder

# What `hf-transfer train` and `fine_tune` start from, where it differs from TransferArguments. A fine-tuning run wants
# to be watched and to be resumable; TransferArguments keeps Trainer's defaults, as a drop-in must.
RUN_DEFAULTS: dict[str, Any] = {
    "strategy": "auto",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 0.05,
    "on_nonfinite": "stop",
    "dataloader_num_workers": -1,  # chosen for the machine
    "boundary_cache": "auto",
    "length_bucketing": "auto",
    "batchnorm": "auto",
    "pooling": "auto",
    "pooling_layer": "auto",
    "calibrate": "auto",
    "refit": "auto",
    "remove_unused_columns": False,  # the task prepares exactly what the model reads
}
NEEDS = ("model", "output", "data")  # what a run cannot do without
COMMAND_LINE_ONLY = ("trust_remote_code", "allow_pickle")
# Headings of TrainingArguments' docstring, shorter or joined; the others stand as they are, in lower case.
TOPICS = {
    "Training Duration and Batch Size": "length and batch size",
    "Learning Rate & Scheduler": "learning rate",
    "Regularization & Training Stability": "regularization",
    "Mixed Precision Training": "precision",
    "Activation Checkpointing": "memory and speed",
    "Compilation": "memory and speed",
    "Kernels": "memory and speed",
    "Additional Optimizations": "memory and speed",
    "Logging & Monitoring Training": "logging",
    "Experiment Tracking Integration": "logging",
    "Metrics Computation": "evaluation",
    "Checkpointing & Saving": "checkpoints",
    "Best Model Tracking": "checkpoints",
    "Resuming Training": "checkpoints",
    "Hugging Face Hub Integration": "hub",
    "Hardware Configuration": "hardware",
    "Accelerate Configuration": "hardware",
    "DDP (DistributedDataParallel)": "distributed",
    "FSDP (Fully Sharded Data Parallel)": "distributed",
    "DeepSpeed": "distributed",
    "Debugging & Profiling (Experimental)": "hardware",
    "External Script Flags (not used by Trainer)": "checkpoints",
}
# Settable in Python only, or by the launcher; and `hub_token`, which would end up in files.
_NOT_KEYS = (
    "in_memory",
    "target_in_memory",
    "parallelism_config",
    "local_rank",
    "hub_token",
    "hub_strategy",  # a run is pushed once, when it has ended
    "hub_always_push",
    "do_train",
    "do_eval",
    "do_predict",
    "debug",
    "remove_unused_columns",
    "label_names",
    # A run's metrics need every logit, in the precision that the model is saved and predicts in.
    "prediction_loss_only",
    "eval_do_concat_batches",
    "batch_eval_metrics",
    "bf16_full_eval",
    "fp16_full_eval",
)
# Other names of keys, which older releases of transformers have alone.
_OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


# Headings of the classes whose keys declare no topic of their own.
_TOPIC_OF: tuple[tuple[type, str], ...] = (
    (ModelArguments, "model"),
    (DataArguments, "data"),
    (AdapterArguments, "adapter"),
    (PlanArguments, "plan"),
    (ProbeArguments, "plan"),
    (BoundaryArguments, "speed"),
    (BucketingArguments, "speed"),
    (MachineArguments, "speed"),
    (LossArguments, "loss"),
    (CalibrationArguments, "evaluation"),
    (ForgettingArguments, "against forgetting"),
    (EarlyStoppingArguments, "checkpoints"),
    (AveragingArguments, "checkpoints"),
    (WatchingArguments, "evaluation"),
    (GuardArguments, "checkpoints"),
)


@cache
def keys() -> dict[str, Key]:
    """All keys, by topic."""
    theirs = _trainers_docs()
    training = make_dataclass("Training", [], bases=(TrainingKeys, training_arguments()))
    topics = {name: topic for cls, topic in reversed(_TOPIC_OF) for name in keys_of(cls, topic)}
    entries: dict[str, Key] = {}
    for cls in (ModelArguments, DataArguments, training):
        own = keys_of(cls, "training")
        for name, entry in own.items():
            if name in _NOT_KEYS or _OLD_NAMES.get(name) in own:
                continue
            topic, sentence = theirs.get(name, ("training", ""))
            about = entry.about if entry.about.resume else INHERITED.get(name, Setting())
            entries[name] = replace(
                entry,
                topic=about.topic or topics.get(name, topic),
                default=RUN_DEFAULTS.get(name, entry.default),
                help=(about.help or sentence).rstrip("."),
                choices=tuple(STRATEGIES) if name == "strategy" else entry.choices,
                about=about,
            )
    first = ("output", "model", "data", "plan", "speed", "adapter", "loss", "against forgetting", "domain adaptation")
    order = list(dict.fromkeys([*first, *(topic for topic, _ in theirs.values())]))
    return dict(sorted(entries.items(), key=lambda named: order.index(named[1].topic)))


def _trainers_docs() -> dict[str, tuple[str, str]]:
    """(topic, first sentence) on each of `TrainingArguments`' fields: both stand in its docstring only."""
    topic, found = "training", {}
    doc = training_arguments().__doc__ or ""
    for heading, name, text in re.findall(
        r"^ {8}(?:> ([^\n]+)|(\w+) ?\(`[^\n]*\):?\n +([^\n]+))", doc, flags=re.MULTILINE
    ):
        if heading:
            topic = TOPICS.get(heading, heading.lower())
        else:
            found[name] = (topic, text.split(". ")[0].rstrip(".:"))
    return found


def parser(prog: str = "hf-transfer train", description: str = "", words: str = "") -> argparse.ArgumentParser:
    """All keys and `--config` as options, after `words`."""
    made = make_parser(prog, f"{words}[--config FILE.yaml] [--key value ...]", description)
    made.add_argument("--config", nargs="*", metavar="FILE", help="YAML file of keys; the command line comes before it")
    add_keys(made, keys())
    return made


def parse_command_line(argv: Sequence[str], prog: str = "hf-transfer train") -> tuple[dict[str, Any], list[str]]:
    """(raw values by key, with `config` among them; problems) of `--key value` arguments. Prints `--help` and exits."""
    return parse_run(parser(prog), argv, keys())


def to_commented_yaml(values: Mapping[str, Any]) -> str:
    """A YAML file with every key that a file may hold, with its help: `values` where given, else the defaults."""
    given, problems = {}, list[str]()
    for name, raw in values.items():
        try:
            given[name] = coerce(raw, keys()[name])
        except KeyError:
            problems.append(unknown(name, keys()))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserErrors(problems)
    shown = {name: entry for name, entry in keys().items() if name not in COMMAND_LINE_ONLY}
    values = {name: given.get(name, entry.default) for name, entry in shown.items()}
    return "\n".join(["# Every key of `hf-transfer train`, with its value.", *commented_yaml(shown, values), ""])


# ---- the configuration ---------------------------------------------------------------------------------------------


def _merged(file: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], set[str], list[str]]:
    """(values by key, keys whose value was refused, problems); what was given comes before the file."""
    values: dict[str, Any] = {}
    refused, problems = set[str](), list[str]()
    for source, is_file in ((file, True), (given, False)):
        for name, raw in source.items():
            if name not in keys():
                problems.append(said := unknown(name, keys()))
                refused.add(said.meant)
            elif is_file and name in COMMAND_LINE_ONLY and raw:
                problems.append(f"{name} cannot be set in a file, only on the command line.")
            else:
                try:
                    values[name] = coerce(raw, keys()[name])
                except ValueError as error:
                    problems.append(f"{name}: {error}")
                    refused.add(name)
    return values, refused, problems


@dataclass(frozen=True)
class Values:
    """The values of a configuration, checked as far as that needs neither a model nor data.

    Attributes:
        values: every key with its value.
        given: the keys that were given, in a file or otherwise.
    """

    values: dict[str, Any]
    given: frozenset[str]


def read_values(
    file: Mapping[str, Any],
    given: Mapping[str, Any],
    problems: Sequence[str] = (),
    needs: Collection[str] = NEEDS,
    tasks: Iterable[str] = TASK_NAMES,
) -> Values:
    """Merge defaults, a file's keys and keys given on the command line or in Python; `needs` must be among them.

    Raises:
        UserErrors: every unknown key, wrong value and contradiction, in one message.
    """
    chosen, rejected, wrong = _merged(file, given)
    rejected |= {said.meant for said in problems if isinstance(said, NotAKey)}
    values = {name: chosen.get(name, key.default) for name, key in keys().items()}
    if "output" in needs and not _is_shared(values):
        needs = set(needs) - {"output"}
        values["output_dir"] = values["output_dir"] or _new_folder(values)
    wrong = [*problems, *wrong, *missing(values, rejected, needs), *_problems_of(values, chosen, tuple(tasks))]
    if wrong:
        raise UserErrors(wrong)
    values |= early_stopping.implied(values, chosen)
    return Values(values, frozenset(chosen))


def _problems_of(values: Mapping[str, Any], chosen: Mapping[str, Any], tasks: tuple[str, ...]) -> list[str]:
    """Every problem that shows without a model and without data."""
    plan = PlanArguments(**{f.name: values[f.name] for f in fields(PlanArguments)})
    loss = LossArguments(**{f.name: values[f.name] for f in fields(LossArguments)})
    problems = []
    if values["task"] is not None and values["task"] not in tasks:
        problems.append(f"task: {values['task']!r} is not one of {', '.join(tasks)}.{nearest(values['task'], tasks)}")
    problems += [*contradictions(values, chosen), *_out_of_range(values), *check(plan), *check_loss(loss)]
    problems += [*check_head(values), *check_schedule(values), *early_stopping.check(values)]
    problems += [*early_stopping.check_run(values, chosen), *averaging.check(values)]
    problems += [*forgetting.check(values), *forgetting.check_run(values), *watching.check(values)]
    problems += [*check_adaptation(values), *check_adapted_run(values)]
    return [*problems, *check_bucketing(values), *check_probe(SimpleNamespace(**values)), *check_run(values)]


def _out_of_range(values: Mapping[str, Any]) -> list[str]:
    """The bounds that the keys declare, but for those of a plan, which `check` sees."""
    declared = {name: key.about for name, key in keys().items() if name not in settings_of(PlanArguments)}
    problems = list(wrong_values(values, declared))
    if values["max_steps"] == 0:
        problems.append("max_steps: expected a positive number, or -1 for none, got 0.")
    return problems


def _is_shared(values: Mapping[str, Any]) -> bool:
    """Whether another process or an earlier run must have the same folder."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or bool(values["resume_from_checkpoint"])


def _new_folder(values: Mapping[str, Any]) -> str | None:
    """The folder of a run that was given none."""
    model, data = values["model_name_or_path"], values["dataset_name"] or values["train_file"]
    return str(new_folder(str(model), str(data))) if model and data else None
