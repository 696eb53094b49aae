"""What a run says before it trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForImageClassification, PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_in_notebook

from hf_transfer.adapters.attach import is_adapted, summary
from hf_transfer.analysis import hints
from hf_transfer.data.bucketing import describe, lengths_of
from hf_transfer.data.locate import in_words
from hf_transfer.errors import named
from hf_transfer.files import say
from hf_transfer.run_folder import HISTORY
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.room import too_large
from hf_transfer.training import adapting, contrastive, precision, time_budget
from hf_transfer.training.linear_probe import note
from hf_transfer.training.progress import Bars, Clock, History, Lines, Meter
from hf_transfer.training.trainer import TransferTrainer


def _on_batches(trainer: TransferTrainer) -> str:
    """What `length_bucketing` saves, or why it is off; empty where there is nothing to say."""
    if trainer.args.probe_solver == "lbfgs":  # it needs no training batches
        return ""
    if trainer.bucketing.on:
        return describe(trainer.length_sampler(), trainer.args.world_size)
    return trainer.bucketing.line()


def _on_rates(prepared: Prepared, trainer: TransferTrainer) -> Iterator[str]:
    """Learning rates that cannot work; nothing where a solver takes no steps."""
    config = prepared.config
    if trainer.plan is not None and config.training.probe_solver != "lbfgs":
        is_new = is_adapted(trainer.model) or config.values["from_scratch"]
        optim = getattr(config.training.optim, "value", str(config.training.optim))
        yield from hints.rate_hints(trainer.plan, optim, is_new, trainer.num_steps)


def _on_plan(prepared: Prepared, trainer: TransferTrainer) -> Iterator[str]:
    """What is said below the plan, after the advice on it."""
    args = prepared.config.training
    examples = None if prepared.config.data.streaming else len(prepared.data.train)
    lines = (
        time_budget.note(args, trainer.args.world_size * max(1, trainer.args.n_gpu)),
        precision.line(args.mixed_precision, args.device.type),
        trainer.choices["batchnorm"].line(),
        contrastive.note(args, examples),
        adapting.note(trainer),
        note(args, trainer.below_solution, prepared.loaded.fresh),
    )
    yield from filter(None, lines)


def _on_costs(prepared: Prepared, trainer: TransferTrainer) -> Iterator[str]:
    """Input sizes that would save time, of the keys that were not given."""
    config, sizes, train = prepared.config, prepared.facts.splits["train"].sizes, trainer.train_dataset
    is_text = isinstance(train, Dataset) and "input_ids" in train.column_names
    if config.data.max_seq_length is None and is_text:
        characters = sizes["characters"][1] if "characters" in sizes else None
        batch, is_bucketed = config.training.train_batch_size, trainer.bucketing.on
        yield from filter(None, [hints.length_hint(lengths_of(train, ""), batch, is_bucketed, characters)])
    if config.data.image_size is None and prepared.task.mixes:
        build = partial(AutoModelForImageClassification.from_config, trust_remote_code=config.model.trust_remote_code)
        yield from filter(None, [hints.image_size_hint(sizes, trainer.model.config, build)])


@dataclass(frozen=True)
class Advice:
    """What could be better about the keys of a run.

    Attributes:
        costs: input sizes that would save time.
        rates: learning rates that cannot work, and a plan that memory does not suffice for.
    """

    costs: list[str]
    rates: list[str]


def advise(prepared: Prepared, trainer: TransferTrainer) -> Advice:
    """The advice on a run."""
    return Advice(list(_on_costs(prepared, trainer)), [*_on_rates(prepared, trainer), *too_large(trainer)])


def announce(prepared: Prepared, trainer: TransferTrainer, advice: Advice) -> None:
    """Print what is known before training."""
    config, data = prepared.config, prepared.data
    seen = "a stream, examined in advance: " if config.data.streaming else ""
    counts = ", ".join(f"{n} {seen if n == 'train' else ''}{len(split):,}" for n, split in data.splits.items())
    source = config.data.dataset_name or config.data.train_file
    say(f"{prepared.task.name}: {config.model.model_name_or_path} on {in_words(source)}")
    say(f"Examples: {counts}. Labels: {named(data.labels.names, 10)}.")
    for line in prepared.notes:
        say(line)
    say(f"Data ({prepared.facts.seconds:.1f} s):")
    for line in prepared.facts.lines():
        say(line)
    for line in advice.costs:
        say(f"  Hint: {line}")
    if is_adapted(trainer.model):
        say(summary(trainer.model))
    if line := _on_batches(trainer):
        say(line)
    say()
    for line in prepared.chosen.lines():
        say(line)
    if trainer.plan is not None:
        say(str(trainer.plan))
        for line in [*(f"Warning: {line}" for line in advice.rates), *_on_plan(prepared, trainer)]:
            say(line)
    else:
        say("No plan: every parameter that requires a gradient trains, as under transformers.Trainer.")
    for line in trainer.boundary.lines():
        say(line)
    say()


def replace_progress(trainer: TransferTrainer, output_dir: Path, talks: bool) -> None:
    """Let a run report its progress in its own way, and write its history."""
    trainer.shows_plan = False  # `announce` has printed it
    for default in (DEFAULT_PROGRESS_CALLBACK, ProgressCallback, PrinterCallback):  # notebooks have another first
        trainer.remove_callback(default)
    trainer.callback_handler.callbacks.insert(0, Meter(trainer))
    if talks:
        clock = Clock(trainer)
        trainer.add_callback(clock)
        if (sys.stderr.isatty() or is_in_notebook()) and not trainer.args.disable_tqdm:
            trainer.add_callback(Bars(clock))
        trainer.add_callback(Lines(clock))
    trainer.add_callback(History(trainer, output_dir / HISTORY))
