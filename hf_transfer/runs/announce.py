"""What a run says before it trains."""

from __future__ import annotations

from hf_transfer.adapters.attach import is_adapted, summary
from hf_transfer.data.bucketing import describe
from hf_transfer.errors import named
from hf_transfer.files import say
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.linear_probe import note
from hf_transfer.training.trainer import TransferTrainer


def _on_batches(trainer: TransferTrainer) -> str:
    """What `length_bucketing` saves, or why it is off; empty where there is nothing to say."""
    if trainer.args.probe_solver == "lbfgs":  # it needs no training batches
        return ""
    if trainer.bucketing.on:
        return describe(trainer.length_sampler(), trainer.args.world_size)
    return trainer.bucketing.line()


def announce(prepared: Prepared, trainer: TransferTrainer) -> None:
    """Print what is known before training."""
    config, data = prepared.config, prepared.data
    seen = "a stream, examined in advance: " if config.data.streaming else ""
    counts = ", ".join(f"{n} {seen if n == 'train' else ''}{len(split):,}" for n, split in data.splits.items())
    source = config.data.dataset_name or config.data.train_file
    say(f"{prepared.task.name}: {config.model.model_name_or_path} on {source}")
    say(f"Examples: {counts}. Labels: {named(data.labels.names, 10)}.")
    for line in prepared.notes:
        say(line)
    say(f"Data ({prepared.facts.seconds:.1f} s):")
    for line in prepared.facts.lines():
        say(line)
    if is_adapted(trainer.model):
        say(summary(trainer.model))
    if line := _on_batches(trainer):
        say(line)
    say()
    if trainer.plan is not None:
        for line in prepared.chosen.lines():
            say(line)
        say(str(trainer.plan))
        if line := trainer.choices["batchnorm"].line():
            say(line)
        if more := note(config.training, trainer.below_solution, prepared.loaded.fresh):
            say(more)
    else:
        say("No plan: every parameter that requires a gradient trains, as under transformers.Trainer.")
    for line in trainer.boundary.lines():
        say(line)
    say()
