"""Everything of a run before it trains: data, model, trainer, and the checks that can be made in advance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.adapters.attach import is_adapted, spare_tokens, summary
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.fields import settings_of
from hf_transfer.data.augment import EXAMPLE, Augmentation, Chance, Epochs, Mixed
from hf_transfer.data.bucketing import describe
from hf_transfer.data.examine import counts_only, examine
from hf_transfer.data.facts import Facts
from hf_transfer.data.labels import find_labels, infer_labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.splits import Data, make_data
from hf_transfer.data.streaming import Reader, Stream, beginning, held_out, open_streams
from hf_transfer.errors import UserError, nearest, one_line
from hf_transfer.evaluation.measure import metrics_of
from hf_transfer.evaluation.metrics import names as metric_names
from hf_transfer.features.examples import Views
from hf_transfer.files import say
from hf_transfer.models.load import Loaded
from hf_transfer.runs.machine import check_disk, choose_loader
from hf_transfer.settings import Config
from hf_transfer.tasks import choose_task
from hf_transfer.tasks.base import Task
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.linear_probe import note as note_on_head
from hf_transfer.training.run_identity import fingerprint
from hf_transfer.training.trainer import TransferTrainer

# Data keys that decide what is trained on: a resumed run has the same. What is evaluated on may be another.
_CUT_SAMPLE = 1000  # training examples whose length is measured as the model counts it


@dataclass
class Prepared:
    """Data and model of a configuration, before there is a trainer.

    Attributes:
        config: with what was seen from the data.
        task: what the model reads.
        inputs: the input columns.
        data: the splits.
        loaded: the model with its head, its labels, and notes for the user.
        processor: tokenizer or image processor.
        facts: of the data.
        chance: of augmentation.
    """

    config: Config
    task: Task
    inputs: tuple[str, ...]
    data: Data
    loaded: Loaded
    processor: Any
    facts: Facts
    chance: Chance

    @property
    def notes(self) -> list[str]:
        return [*self.loaded.notes, *self.data.notes]


def prepare(config: Config) -> Prepared:
    """Read the data, see what it is, load the model with a head for it, make the splits.

    Raises:
        UserError: there is no such data or model, or they do not go together.
    """
    args = config.training
    with args.main_process_first(desc="data"):
        splits = (beginning if config.data.streaming else load_splits)(config.data)
    task, inputs = choose_task(splits["train"].features, config.data)
    splits, column = find_labels(splits, inputs, config.data)
    skips = config.data.on_bad_example == "skip"
    labels = infer_labels(splits["train"], column, config.data.problem_type, skips)
    loaded, processor = task.load(config.model, config.data, labels)
    if spare := spare_tokens(args, loaded.model):
        processor.model_max_length -= spare
    data = make_data(splits, inputs, column, loaded.labels, config.data, config.split_seed)
    data, facts = know(task, data, config.data, processor, config.split_seed)
    choose_loader(args, task, config.data.streaming)
    problem_type = loaded.labels.problem_type
    _check_best(args, problem_type, len(loaded.labels.names))
    if not config.data.streaming:
        _check_batches(args, len(data.train))
    named = config.data.label_column_name or column
    seen: dict[str, Any] = {"task": task.name, "problem_type": problem_type, "label_column_name": named}
    if task.input_key:
        seen[task.input_key] = list(inputs) if len(inputs) > 1 else inputs[0]
    args.layer_rules = [*(args.layer_rules or []), *loaded.layer_rules] or None
    chance = Chance(args.seed, config.data.augmented_views)
    return Prepared(config.resolved(**seen), task, inputs, data, loaded, processor, facts, chance)


def know(task: Task, data: Data, args: DataArguments, processor: Any, seed: int) -> tuple[Data, Facts]:
    """(the data without what is left out, its facts): see `data.examine`."""
    if not (args.data_facts or args.drop_leaks or args.on_bad_example == "skip"):
        return data, counts_only(data)
    data, facts = examine(data, task.trace, args, seed)
    sample = data.train.select(range(min(len(data.train), _CUT_SAMPLE)))
    facts.cut = task.cut(sample, data.inputs, processor)
    return data, facts


def prepare_splits(prepared: Prepared) -> dict[str, Any]:
    """The splits as the model reads them, by name; the training split with its random changes, or as a stream."""
    task, inputs, args = prepared.task, prepared.inputs, prepared.config.data
    rest = {
        k: task.prepare(v, inputs, prepared.processor, args) for k, v in prepared.data.splits.items() if k != "train"
    }
    if args.streaming:
        return {"train": training_stream(prepared), **rest}
    train = task.prepare_training(prepared.data.train, inputs, prepared.processor, args, prepared.chance)
    return {"train": train, **rest}


def training_stream(prepared: Prepared) -> Stream:
    """The training set of a run with `streaming`, without what is held out."""
    task, args, loader = prepared.task, prepared.config.data, prepared.config.training
    source = open_streams(args)["train"]
    reader = Reader(
        prepared.inputs,
        source.features,
        prepared.loaded.labels,
        args,
        held_out(prepared.data),
        task.read,
        task.change(prepared.inputs, prepared.processor, args, prepared.chance),
    )
    stream = Stream(source, reader, prepared.config.split_seed, args.shuffle_buffer_size)
    loader.dataloader_num_workers = min(loader.dataloader_num_workers, stream.shards)
    if not loader.dataloader_num_workers:  # neither goes without workers
        loader.dataloader_persistent_workers, loader.dataloader_prefetch_factor = False, None
    return stream


def make_trainer(prepared: Prepared, train: Any, validation: Any) -> TransferTrainer:
    """The trainer with its plan resolved, and everything checked that can be before training.

    Raises:
        UserError: the plan, the optimizer, the schedule or the tracker does not go with the model.
    """
    args, output_dir = prepared.config.training, Path(str(prepared.config.training.output_dir))
    labels = prepared.loaded.labels
    with _trainers_refusals(output_dir):
        trainer = TransferTrainer(
            model=prepared.loaded.model,
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=prepared.processor,
            data_collator=_collator(prepared),
            compute_metrics=lambda p: metrics_of(labels.problem_type, p),
        )
        trainer.data_keys = _course(prepared)
        trainer.add_callback(Epochs(prepared.chance))
        trainer.boundary.blocked = _live_changes(prepared)
        if prepared.chance.views is not None:
            trainer.boundary.views = Views(prepared.chance, prepared.data.train.with_format(None)[EXAMPLE][:])
        trainer.resolve_plan()
        trainer.check_optimization()
        check_disk(output_dir, trainer)
    return trainer


def _course(prepared: Prepared) -> dict[str, Any]:
    """The data keys that must stay the same; of a stream also what it begins with, and who reads it."""
    data, args = prepared.config.data, prepared.config.training
    found = {name: getattr(data, name) for name, about in settings_of(DataArguments).items() if about.resume == "fixed"}
    if data.streaming:
        found |= {
            "shuffle_buffer_size": data.shuffle_buffer_size,
            "max_eval_samples": data.max_eval_samples,
            "max_predict_samples": data.max_predict_samples,
            "dataloader_num_workers": args.dataloader_num_workers,
            "the stream's beginning": fingerprint(prepared.data.train),
        }
    return found


def _collator(prepared: Prepared) -> Any:
    """The task's, with mixup and cutmix.

    Raises:
        UserError: the task's inputs cannot be mixed, or changed as images are.
    """
    task, args = prepared.task, prepared.config.data
    collator = task.collator(prepared.processor)
    images_only = {"augmentation": "none", "random_erasing": None, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    wanted = [k for k, nothing in images_only.items() if getattr(args, k) not in (nothing, 0.0)]
    if wanted and not task.mixes:
        raise UserError(f"{wanted[0]}: it changes images, and the data is of {task.name}.", "Leave it out.")
    if args.token_masking and task.mixes:
        raise UserError("token_masking: it changes texts, and the data holds images.", "Leave it out.")
    needs_mixing = Mixed.wanted(args) or Augmentation.wanted(args)  # also what drops the examples' numbers
    return Mixed(collator, args, prepared.loaded.labels, prepared.chance) if needs_mixing else collator


def _live_changes(prepared: Prepared) -> list[str]:
    """Why training examples are not the same in every epoch."""
    args, found = prepared.config.data, []
    if Mixed.wanted(args):
        found.append("mixup and cutmix blend other images in each epoch")
    elif Augmentation.wanted(args) and args.augmented_views is None:
        found.append("each epoch augments images anew; augmented_views: 4 keeps four views of each")
    if args.token_masking:
        found.append("token_masking masks other tokens in each epoch")
    return found


def announce(prepared: Prepared, trainer: TransferTrainer) -> None:
    """What is known before training."""
    config, data = prepared.config, prepared.data
    seen = "a stream, of which are looked at " if config.data.streaming else ""
    counts = ", ".join(f"{n} {seen if n == 'train' else ''}{len(split):,}" for n, split in data.splits.items())
    source = config.data.dataset_name or config.data.train_file
    say(f"{prepared.task.name}: {config.model.model_name_or_path} on {source}")
    say(
        f"Examples: {counts}. Labels: {', '.join(data.labels.names[:10])}"
        + (f" and {len(data.labels.names) - 10} more." if len(data.labels.names) > 10 else ".")
    )
    for note in prepared.notes:
        say(note)
    say(f"Data ({prepared.facts.seconds:.1f} s):")
    for line in prepared.facts.lines():
        say(line)
    if is_adapted(trainer.model):
        say(summary(trainer.model))
    if trainer.args.length_bucketing:
        say(describe(trainer.length_sampler(), trainer.args.world_size))
    say()
    if trainer.plan is not None:
        if config.values["strategy"] == "auto" and config.values["stages"] is None:
            say(f"strategy auto: {trainer.plan.strategy} (overrule it with --strategy)")
        say(str(trainer.plan))
        if more := note_on_head(config.training):
            say(more)
    else:
        say("No plan: every parameter that requires a gradient trains, as under transformers.Trainer.")
    for line in trainer.boundary.lines():
        say(line)
    say()


# ---- checks ----


@contextlib.contextmanager
def _trainers_refusals(output_dir: Path) -> Iterator[None]:
    """Values that only Trainer's constructor rejects, such as a tracker that is not installed."""
    existed = output_dir.exists()
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if not existed and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()  # Trainer makes it before it has looked at everything
        if isinstance(error, UserError):
            raise
        raise UserError(one_line(error)) from error


def _check_best(args: TransferArguments, problem_type: str, num_labels: int) -> None:
    """Trainer looks for the metric after the first epoch only.

    Raises:
        UserError: there is no such metric.
    """
    known = ("loss", *metric_names(problem_type, num_labels))
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in known:
        raise UserError(
            f"metric_for_best_model: {args.metric_for_best_model!r} is no metric of {problem_type}.",
            f"There are {', '.join(known)}.{nearest(wanted, known)}",
        )


def _check_batches(args: TransferArguments, examples: int) -> None:
    """Raises:
    UserError: an epoch would have no batch.
    """
    size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and examples < size:
        raise UserError(
            f"per_device_train_batch_size: {args.per_device_train_batch_size} makes a batch of {size}, there are "
            f"{examples} training examples, and dataloader_drop_last drops a batch that is not full.",
            "Take a smaller batch, or leave dataloader_drop_last out.",
        )
