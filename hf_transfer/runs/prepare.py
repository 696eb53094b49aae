"""Everything that a run does before training: data, model, trainer, and all checks that can be made in advance."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_transfer.adapters.attach import is_adapted, make_room
from hf_transfer.adapters.continued import train_head
from hf_transfer.analysis.few_labels import Chosen
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.fields import settings_of
from hf_transfer.data.augment import EXAMPLE, Chance, Epochs
from hf_transfer.data.columns import Columns, as_shown, shown_numbers, unread
from hf_transfer.data.examine import counts_only, examine
from hf_transfer.data.facts import Facts
from hf_transfer.data.groups import shared_groups
from hf_transfer.data.label_columns import LabelColumn, find_labels
from hf_transfer.data.label_variants import variant_notes
from hf_transfer.data.labels import Labels, infer_labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.locate import Source, locate
from hf_transfer.data.splits import SHARE, Data, held_out_share, make_data
from hf_transfer.data.stream_record import Passed
from hf_transfer.data.stream_training import Reader, Stream, held_groups, held_out
from hf_transfer.data.streaming import beginning, open_streams
from hf_transfer.evaluation.measure import metrics_of
from hf_transfer.features import FeatureStore, FrozenFeatures
from hf_transfer.features.examples import Views
from hf_transfer.models.load import Loaded, names_in_checkpoint
from hf_transfer.run_folder import PASSED
from hf_transfer.runs.checks import check_batches, check_best, check_grown, trainer_errors
from hf_transfer.runs.collating import collator, live_changes
from hf_transfer.runs.decisions import with_decisions
from hf_transfer.runs.earlier import Earlier, equip, read_earlier
from hf_transfer.runs.machine import check_disk, choose_loader
from hf_transfer.runs.shared import Shared
from hf_transfer.runs.target import Target, drawn, read_target
from hf_transfer.settings import Config
from hf_transfer.tasks import choose_task
from hf_transfer.tasks.base import Task
from hf_transfer.training import adalora
from hf_transfer.training.course import Course
from hf_transfer.training.pace import log_interval
from hf_transfer.training.run_subject import backbone_facts, sampled
from hf_transfer.training.trainer import TransferTrainer

_CUT_SAMPLE = 1000  # training examples whose length is measured in the model's tokens


@dataclass
class Prepared:
    """Data and model of a configuration.

    Attributes:
        config: completed with what was inferred from the data and decided for the machine.
        source: where the data is.
        stream: raw training stream of a run with `streaming`, else None.
        numbers: inputs that were written as text and that the data showed to be numbers.
        task: what the model reads.
        inputs: the input columns.
        data: the splits.
        loaded: the model with its head, its labels, and notes for the user.
        processor: tokenizer or image processor.
        facts: facts about the data.
        chance: source of randomness for augmentation.
        backbone: identity of the backbone, as it was loaded.
        earlier: what is read of an earlier task, against forgetting.
        target: of domain adaptation; None without it.
        measured: the split whose metrics are the run's; the test split where there is one, unless the run is one of
            several, of which only the chosen one is measured on it.
        chosen: keys that were set because they were not given; see `runs.choosing`.
        store: keeps frozen features until training begins, if several parts of the run read them; see
            `runs.frozen_pass`.
        code_below: `FrozenFeatures.code` of the model before `pooling` changed its upper layers, if those below compute
            what they did; None if nothing was changed, or compared.
        frozen: features of the training examples while layers are compared; then, from the search for wrong labels
            until training begins, also of the validation examples that were drawn from them.
    """

    config: Config
    source: Source
    stream: Any
    numbers: frozenset[str]
    task: Task
    inputs: tuple[str, ...]
    data: Data
    loaded: Loaded
    processor: Any
    facts: Facts
    chance: Chance
    backbone: dict[str, Any]
    earlier: Earlier
    target: Target | None = None
    measured: str = "validation"
    chosen: Chosen = field(default_factory=Chosen)
    store: FeatureStore | None = None
    code_below: str | None = None
    frozen: FrozenFeatures | None = None

    @property
    def notes(self) -> list[str]:
        of_target = self.target.notes if self.target else ()
        return [*self.loaded.notes, *self.data.notes, *self.earlier.notes, *of_target]


def prepare(config: Config, among: Shared | None = None) -> Prepared:
    """Read the data, infer its task and labels, load the model with a head for them, and make the splits.

    Args:
        config: the keys.
        among: of several runs, what they share.

    Raises:
        UserError: the data or the model does not exist, or they do not fit together.
    """
    args, keys = config.training, config.data
    with args.main_process_first(desc="data"):
        source = locate(keys)
        read = beginning if keys.streaming else load_splits if among is None else among.splits
        splits = read(keys, source)
    columns = Columns(splits["train"], splits.written, keys.text_column_name)
    task, inputs = choose_task(columns, keys)
    skips, numbers = keys.on_bad_example == "skip", shown_numbers(splits, columns, inputs)
    splits = as_shown(splits, columns, inputs, skips)
    keys = replace(
        keys,
        train_val_split=keys.train_val_split or SHARE if keys.streaming else held_out_share(keys, len(splits["train"])),
    )
    found = find_labels(splits, inputs, keys, checkpoint=partial(names_in_checkpoint, config.model))
    labels = infer_labels(found.splits["train"], found.name, keys.problem_type, skips, found.entries)
    if among is not None:
        among.check(labels.problem_type)
    target = read_target(config, task, inputs, keys.label_column_name or found.name, labels, splits["train"])
    loaded, processor = task.load(config.model, keys, labels)
    check_grown(loaded, args)
    make_room(processor, args, loaded.model)
    data = make_data(found.splits, inputs, found.name, labels=loaded.labels, args=keys, seed=config.split_seed)
    data, facts = know(task, data, keys, processor, config.split_seed)
    if keys.split_group_column_name:
        facts.group_leaks = shared_groups(data.splits, keys.split_group_column_name)
    facts.decided = [*found.splits.notes, *_roles(columns, inputs, found, labels, keys)]
    facts.pixels = task.settle(data, loaded.model, processor, keys)
    if keys.data_facts:
        facts.misfits = task.misfits(data.train, inputs, loaded.model, processor)
    stream = open_streams(keys, source)["train"] if keys.streaming else None
    check_best(args, loaded.labels)
    if stream is None:
        check_batches(args, len(data.train))
    inferred = _inferred(task, inputs, found, keys, loaded.labels.problem_type) | _decided(facts)
    return Prepared(
        config=_completed(config.resolved(train_val_split=keys.train_val_split, **inferred), task, loaded, stream),
        source=source,
        stream=stream,
        numbers=numbers,
        task=task,
        inputs=inputs,
        data=data,
        loaded=loaded,
        processor=processor,
        facts=facts,
        chance=Chance(args.seed, keys.augmented_views),
        backbone=backbone_facts(loaded.model, loaded.fresh, config.model.from_scratch),
        earlier=read_earlier(config, task, data, loaded, processor),
        target=target,
        measured="test" if data.test is not None and (among is None or not among.leaves_test) else "validation",
        store=None if among is None else among.store,
    )


def _completed(config: Config, task: Task, loaded: Loaded, stream: Any) -> Config:
    """The configuration with what model and machine decide."""
    args = config.training
    return with_decisions(
        config,
        choose_loader(args, task, shards=None if stream is None else int(stream.num_shards)),
        {"layer_rules": [*(args.layer_rules or []), *loaded.layer_rules] or None},
    )


def _inferred(
    task: Task, inputs: tuple[str, ...], found: LabelColumn, keys: DataArguments, problem_type: str
) -> dict[str, Any]:
    """Data keys with what was inferred from the data."""
    inferred: dict[str, Any] = {
        "task": task.name,
        "problem_type": problem_type,
        "label_column_name": keys.label_column_name or found.name,
        "label_delimiter": found.delimiter,
        "label_vector_names": list(found.entries) or None,
    }
    if task.input_key:
        inferred[task.input_key] = list(inputs) if len(inputs) > 1 else inputs[0]
    return inferred


def _roles(
    columns: Columns, inputs: tuple[str, ...], found: LabelColumn, labels: Labels, keys: DataArguments
) -> list[str]:
    """What each column of the data is taken for, as notes."""
    given = keys.label_column_name or found.name
    targets = given if isinstance(given, list) else [given]
    kinds = {
        "regression": "numbers",
        "single_label_classification": f"{len(labels.names):,} classes",
        "multi_label_classification": f"{len(labels.names):,} labels, several per example",
    }
    target = f"label {', '.join(map(repr, targets))}: {kinds[labels.problem_type]}"
    pair = len(inputs) == 2 and not keys.text_column_name
    hint = f" (text_column_name: {inputs[0]} reads one)" if pair else ""
    groups = f"; groups {keys.split_group_column_name!r}" if keys.split_group_column_name else ""
    roles = f"Columns: input {' and '.join(map(repr, inputs))}{hint}; {target}{groups}."
    return [
        roles,
        *unread(columns, inputs, (*targets, keys.split_group_column_name or "")),
        *variant_notes(found.splits, found.name, labels),
    ]


def _decided(facts: Facts) -> dict[str, Any]:
    """Data keys that the training split decided."""
    return {"pixel_range": list(facts.pixels.range)} if facts.pixels else {}


def know(task: Task, data: Data, args: DataArguments, processor: Any, seed: int) -> tuple[Data, Facts]:
    """(data without the examples that are left out, facts about it); see `data.examine`."""
    if not (args.data_facts or args.drop_leaks or args.on_bad_example == "skip"):
        return data, counts_only(data)
    data, facts = examine(data, task.trace, args, seed)
    sample = data.train.select(range(min(len(data.train), _CUT_SAMPLE)))
    facts.cut = task.cut(sample, data.inputs, processor)
    return data, facts


def prepare_splits(prepared: Prepared) -> dict[str, Any]:
    """The splits as model inputs, by name; the training split is augmented, or a stream."""
    task, inputs, args = prepared.task, prepared.inputs, prepared.config.data
    named = prepared.data.splits.items()
    skipped = ("train", *(() if prepared.measured == "test" else ("test",)))
    rest = {k: task.prepare(v, inputs, prepared.processor, args) for k, v in named if k not in skipped}
    if args.streaming:
        return {"train": training_stream(prepared), **rest}
    train = task.prepare_training(_training(prepared), inputs, prepared.processor, args, prepared.chance)
    return {"train": train, **rest}


def _training(prepared: Prepared) -> Dataset:
    """The training split, and after it the labeled examples of a target."""
    train, target = prepared.data.train, prepared.target
    return train if target is None else target.joined(train, prepared.loaded.labels)


def training_stream(prepared: Prepared) -> Stream:
    """The training set of a run with `streaming`, without held-out examples."""
    task, args, training = prepared.task, prepared.config.data, prepared.config.training
    # Each process reads all of the stream, of which it trains on its share.
    passed = Passed(Path(str(training.output_dir)) / PASSED) if training.process_index == 0 else None
    reader = Reader(
        inputs=prepared.inputs,
        features=prepared.stream.features,
        labels=prepared.loaded.labels,
        args=args,
        held=held_out(prepared.data),
        held_groups=held_groups(prepared.data, args),
        numbers=prepared.numbers,
        passed=passed,
        read=task.read,
        change=task.change(prepared.inputs, prepared.processor, args, prepared.chance),
    )
    return Stream(prepared.stream, reader, prepared.config.split_seed, args.shuffle_buffer_size)


def make_trainer(prepared: Prepared, train: Any, validation: Any) -> TransferTrainer:
    """The trainer with its plan resolved, after all checks that are possible before training.

    Raises:
        UserError: the plan, the optimizer, the schedule or the tracker does not fit the model.
    """
    args, output_dir = prepared.config.training, Path(str(prepared.config.training.output_dir))
    labels = prepared.loaded.labels
    course, target, chance = Course(labels.problem_type), prepared.target, prepared.chance
    train_head(prepared.loaded.model, args.layer_rules or ())
    with trainer_errors(output_dir):
        trainer = TransferTrainer(
            model=prepared.loaded.model,
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            labeled_targets=0 if target is None else len(train) - len(prepared.data.train),
            target_dataset=drawn(target, prepared.config, prepared.task, prepared.processor, chance),
            processing_class=prepared.processor,
            data_collator=collator(prepared.task, prepared.processor, prepared.config.data, labels, chance),
            compute_metrics=course.watching(lambda p: metrics_of(labels.problem_type, p, args.metric_for_best_model)),
        )
        if target is not None and trainer.self_training is not None:
            trainer.self_training.plain = target.plain(prepared.task, prepared.processor, prepared.config.data)
        if is_adapted(trainer.model) and not is_adapted(prepared.loaded.model):  # plain peft reads it there
            trainer.model.active_peft_config.revision = prepared.loaded.revision
        course.trainer = trainer
        trainer.course = course
        trainer.data_keys = _course(prepared)
        trainer.backbone = prepared.backbone
        trainer.chosen = {name: choice.value for name, choice in prepared.chosen.keys.items()}
        trainer.add_callback(Epochs(prepared.chance))
        equip(
            trainer,
            prepared.earlier,
            prepared.config,
            prepared.task,
            prepared.data,
            prepared.loaded,
            prepared.processor,
            prepared.chance,
        )
        trainer.boundary.blocked += live_changes(prepared.config.data)
        if prepared.chance.views is not None:
            trainer.boundary.views = Views(prepared.chance, _training(prepared).with_format(None)[EXAMPLE][:])
        steps = trainer.resolve_plan()
        adalora.check_schedule(trainer.model, steps)
        if "logging_steps" not in prepared.config.given:
            trainer.time_budget.log_fraction = args.logging_steps
            args.logging_steps = log_interval(args.logging_steps, steps)
        trainer.check_optimization()
        check_disk(output_dir, trainer)
    return trainer


def _course(prepared: Prepared) -> dict[str, Any]:
    """Keys of model and data that must not change when resuming; for a stream also its beginning and its workers."""
    data, args = prepared.config.data, prepared.config.training
    fixed = {
        name: getattr(keys, name)
        for keys in (prepared.config.model, data)
        for name, about in settings_of(type(keys)).items()
        if about.resume == "fixed"
    }
    if data.streaming:
        fixed |= {
            "shuffle_buffer_size": data.shuffle_buffer_size,
            "max_eval_samples": data.max_eval_samples,
            "max_predict_samples": data.max_predict_samples,
            "dataloader_num_workers": args.dataloader_num_workers,
            "the stream's first examples": sampled(prepared.data.train),
        }
    return fixed
