"""A fine-tuning run, from keys to a folder that loads anywhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.data.labels import MULTI_LABEL
from hf_transfer.errors import WorkFailed
from hf_transfer.evaluation.calibration import Calibration
from hf_transfer.evaluation.thresholds import tune_thresholds
from hf_transfer.files import say, write_json, write_text
from hf_transfer.hub import card, push
from hf_transfer.hub.files import refuse_local
from hf_transfer.models.averaging import State
from hf_transfer.objectives.adaptation import outcome
from hf_transfer.objectives.fisher import Fisher
from hf_transfer.run_folder import FISHER, RESULTS, RUN_FILE
from hf_transfer.runs import adaptation_choice, adjusting, refitting, saving, trainings
from hf_transfer.runs.adapted import adapted
from hf_transfer.runs.announce import advise, announce, replace_progress
from hf_transfer.runs.calibrating import OFF, Choice, calibrate, forget
from hf_transfer.runs.calibrating import choose as choose_calibration
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.configured import configured
from hf_transfer.runs.decisions import reasons, with_choices, with_decisions
from hf_transfer.runs.domains import Domains, domains_of
from hf_transfer.runs.earlier import add_fisher
from hf_transfer.runs.errors import write_errors
from hf_transfer.runs.expecting import expected_of
from hf_transfer.runs.facts import base_of, facts_of, measured, validated
from hf_transfer.runs.finding_rate import Found, find_rate
from hf_transfer.runs.forgetting import Watching, watch
from hf_transfer.runs.label_issues import write_label_issues
from hf_transfer.runs.machine import (
    check_writable,
    end_workers,
    own_threads,
    pin_memory,
    quiet_libraries,
    removed_if_empty,
    share_cores,
)
from hf_transfer.runs.neighbors import KEY as NEAREST
from hf_transfer.runs.neighbors import Nearest, neighbors_of
from hf_transfer.runs.preflight import Preflight, try_run
from hf_transfer.runs.prepare import Prepared, make_trainer, prepare, prepare_splits
from hf_transfer.runs.pricing import with_price
from hf_transfer.runs.publishing import publish
from hf_transfer.runs.reporting import change_of, write_report
from hf_transfer.runs.result import Result
from hf_transfer.runs.resumed import checkpoint_of
from hf_transfer.runs.room import memory_line
from hf_transfer.runs.shared import Shared
from hf_transfer.runs.threads import choose_threads
from hf_transfer.runs.timing import check_compilation
from hf_transfer.runs.workers import choose_workers
from hf_transfer.settings import Config
from hf_transfer.training.console import is_silent
from hf_transfer.training.trainer import TransferTrainer


def fine_tune(
    model_name_or_path: str | None = None,
    dataset_name: Any = None,
    *,
    eval_dataset: Any = None,
    test_dataset: Any = None,
    target_dataset: Any = None,
    **keys: Any,
) -> Result:
    """Fine-tune a pretrained model on a dataset.

    Args:
        model_name_or_path: hub id, local folder, `timm/<name>` or `bundled:<name>`.
        dataset_name: hub id, file, folder or `bundled:<name>`; or the data itself: a `datasets.Dataset`, a
            `DatasetDict`, a pandas frame, a dict of columns, a list of dicts, a tuple of inputs and labels, or a
            mapping of split names to these. Or give `train_file`.
        eval_dataset: the validation split: the data itself, or a file.
        test_dataset: the test split, likewise.
        target_dataset: unlabeled data of the domain that the model must work on, for `domain_adaptation`; as
            `dataset_name`.
        **keys: any key of `hf-transfer train`. Without `output_dir`, the run is written to a new folder below `runs/`.

    Raises:
        UserError: the keys, the model or the data are not right; all problems of the keys are in one message.
    """
    more = {"eval_dataset": eval_dataset, "test_dataset": test_dataset, "target_dataset": target_dataset}
    return run(configured(model_name_or_path, dataset_name, {**keys, **more}))


def run(config: Config, among: Shared | None = None) -> Result:
    """Run a configuration in four steps: prepare, train, finish, publish.

    Args:
        config: the keys.
        among: of several runs, what they share. Then the test split is not measured: it is left for what is chosen. No
            report is written.

    Raises:
        UserError: the keys, the model or the data are not right, before anything is trained.
        WorkFailed: training, or a check of what it left, failed.
    """
    if adaptation_choice.is_asked(config):
        return adaptation_choice.run_auto(config, run, among)
    with quiet_libraries(config.training), own_threads():
        ready = _prepare(config, among)
        _train(ready)
        result = _finish(ready)
        if among is None:
            write_report(ready.prepared, ready.trainer, result.predictor, ready.splits["train"], ready.output_dir)
    if ready.trainer.is_world_process_zero():
        publish(result, ready.prepared, ready.target, ready.talks)
    return result


@dataclass
class _Ready:
    """A run that can begin.

    Attributes:
        prepared: task, data, model and processor, with the configuration that was completed from the data.
        splits: prepared examples by split.
        trainer: holds the model and the plan.
        output_dir: the run's folder.
        checkpoint: to resume from, if any.
        target: where the finished run is pushed, if anywhere.
        talks: whether the run reports its progress.
        preflight: what was tried before training; None without `preflight`.
        calibrates: what `calibrate` came to.
        refits: what `refit` came to.
        found: what the frozen features say of the labels and of the accuracy to expect, for `results.json`.
        watching: measures what the model forgets; None without `forgetting_dataset_name`.
        nearest: the training examples nearest to those that the run is measured on.
        domains: source and target before training; None without domain adaptation.
        range_test: of `learning_rate: auto`; None without it, and in a resumed run.
        selection: what it was chosen from (`adaptation_choice`); None of a run that was not.
        fisher: information of `ewc_dataset_name`, for the run's folder.
        start: the weights before training, where it will be repeated (`refit`).
    """

    prepared: Prepared
    splits: dict[str, Any]
    trainer: TransferTrainer
    output_dir: Path
    checkpoint: str | None
    target: push.Target | None
    talks: bool
    preflight: Preflight | None = None
    calibrates: Choice = OFF
    refits: Choice = OFF
    found: dict[str, Any] = field(default_factory=dict)
    nearest: Nearest = field(default_factory=Nearest)
    domains: Domains | None = None
    range_test: Found | None = None
    fisher: Fisher | None = None
    watching: Watching | None = None
    selection: dict[str, Any] | None = None
    start: State | None = None


def _prepare(config: Config, among: Shared | None) -> _Ready:
    """Everything that can fail before the first step, cheapest checks first."""
    began, args = time.perf_counter(), config.training
    output_dir = Path(str(args.output_dir))
    checkpoint, is_new = checkpoint_of(config, output_dir), not output_dir.exists()
    check_writable(output_dir)
    target = push.wanted(config.values)
    doubt = push.before_training(target, output_dir) if target else ""
    share_cores(args)
    set_seed(args.seed)
    # Trainer's own push would need the hub before training.
    config = with_price(with_decisions(config, {"push_to_hub": False}, pin_memory(args)))
    prepared = choose(prepare(config, among), checkpoint, is_one_of_several=among is not None)
    forget(prepared.loaded.model)
    splits = prepare_splits(prepared)
    trainer = make_trainer(prepared, splits["train"], splits["validation"])
    with removed_if_empty(output_dir, is_new):
        prepared = choose_threads(prepared, trainer, splits)
        fisher = add_fisher(trainer, prepared.earlier, config, prepared.task, output_dir)
        prepared, range_test = find_rate(prepared, trainer, splits, checkpoint)
        prepared = choose_workers(prepared, trainer, splits)
    prepared = replace(prepared, config=with_choices(prepared.config, trainer, checkpoint))
    if target and is_adapted(trainer.model):
        refuse_local(str(base_of(prepared.config, trainer.model)))
    trainer.time_budget.prepared_since = began
    trainer.boundary.decide()
    ready = _Ready(
        prepared=prepared,
        splits=splits,
        trainer=trainer,
        output_dir=output_dir,
        checkpoint=checkpoint,
        target=target,
        talks=not is_silent(args),
        range_test=range_test,
        fisher=fisher,
        selection=among.selection if among else None,
    )
    if among is not None and among.keeps_last:
        trainer.add_callback(adaptation_choice.KeepLast())
    replace_progress(trainer, output_dir, ready.talks)
    for watcher in among.watchers if among else ():
        trainer.add_callback(watcher)
    ready.watching = watch(prepared, trainer)  # after what writes its logs
    if trainer.is_world_process_zero():
        if ready.talks:
            announce(prepared, trainer, advise(prepared, trainer))
        if doubt:
            sys.stderr.write(f"{doubt}\n")
    with removed_if_empty(output_dir, is_new):
        if checkpoint is None:
            check_compilation(prepared, trainer, splits)
        _try(ready, among)
    if trainer.is_world_process_zero():
        _open_folder(ready)
    issues = write_label_issues(ready.prepared, trainer, output_dir, checkpoint, ready.talks)
    expected = expected_of(ready.prepared, trainer, issues, checkpoint, ready.talks)
    ready.nearest = neighbors_of(ready.prepared, trainer, issues, ready.talks)
    ready.domains = domains_of(ready.prepared, trainer, ready.talks)
    ready.prepared.store = ready.prepared.frozen = None  # nothing reads frozen features after this
    ready.found = {"label_issues": issues, "expected": expected}
    compared = ready.prepared.chosen.to_dict()["pooling_candidates"]
    trainer.before_training = ready.found | {"pooling_candidates": compared}
    return ready


def _try(ready: _Ready, among: Shared | None) -> None:
    """The preflight, and whether the model can be calibrated and its head solved for again."""
    prepared, trainer = ready.prepared, ready.trainer
    adjusting.check(trainer, prepared.loaded.labels.problem_type)
    ready.refits = refitting.choose(prepared, trainer, is_one_of_several=among is not None)
    if trainer.args.preflight:
        ready.preflight = try_run(prepared, trainer, ready.splits, ready.output_dir)
    answers = refitting.calibrates_on(ready.refits, prepared, trainer)
    ready.calibrates = choose_calibration(trainer, prepared.loaded.labels.problem_type, answers)


def _open_folder(ready: _Ready) -> None:
    """Say what the preflight found, and write the files that a run begins with."""
    prepared, folder, resumes = ready.prepared, ready.output_dir, ready.checkpoint is not None
    for line in _said_before(ready) if ready.talks else ():
        say(line)
    if prepared.config.data.overwrite_output_dir and not resumes:
        saving.clear(folder, ready.talks)
    if ready.range_test is not None:
        ready.range_test.write(folder)
    if ready.fisher is not None:
        ready.fisher.save(folder / FISHER)
    _write_run_file(ready)
    saving.record_examples(prepared, folder, is_resumed=resumes, refits=ready.refits.value)


def _write_run_file(ready: _Ready) -> None:
    prepared = ready.prepared
    asked = {"calibrate": ready.calibrates, refitting.KEY: ready.refits}
    own = {name: choice.value for name, choice in asked.items()}
    config = replace(prepared.config, values=prepared.config.values | own)
    ready.prepared = replace(prepared, config=config)
    chosen = {
        name: choice.why if config.values[name] == choice.value else f"{choice.value} here: {choice.why}"
        for name, choice in prepared.chosen.keys.items()
    }
    why = reasons(config, chosen, ready.trainer, {name: choice.why for name, choice in asked.items()})
    write_text(ready.output_dir / RUN_FILE, config.to_yaml(why))


def _said_before(ready: _Ready) -> list[str]:
    """What is said after the preflight."""
    refits = refitting.line(ready.refits, ready.prepared, ready.trainer)
    lines = ready.preflight.lines() if ready.preflight else []
    return [*lines, *filter(None, [memory_line(ready.trainer), ready.calibrates.line(), refits])]


def _train(ready: _Ready) -> None:
    """Train, and save the model before it is evaluated: what fails there does not cost the training."""
    if ready.refits.value and ready.trainer.args.probe_solver != "lbfgs":
        ready.start = trainings.beginning(ready.trainer)
    skips_ahead = ready.checkpoint is not None and bool(ready.prepared.config.training.ignore_data_skip)
    with saving.recorded_stream(ready.splits["train"], ready.output_dir, skips_ahead):
        ready.trainer.train(resume_from_checkpoint=ready.checkpoint)
    saving.save_model(ready.trainer, ready.output_dir)


def _finish(ready: _Ready) -> Result:
    """Evaluate the saved model, check that it reloads, and write what is known about the run."""
    prepared, trainer, output_dir = ready.prepared, ready.trainer, ready.output_dir
    config, task, labels, args = prepared.config, prepared.task, prepared.loaded.labels, prepared.config.training
    calibration, held_out = _calibrate(ready), ready.splits["validation"]
    adjustment = adjusting.adjust(trainer, held_out, output_dir)
    if args.tune_thresholds and labels.problem_type == MULTI_LABEL:
        tune_thresholds(trainer, held_out)
    validation = validated(trainer, labels.problem_type)
    refitted = None
    if ready.refits.value:
        refitted = refitting.refit(prepared, trainer, ready.splits, ready.start, calibration, adjustment)
        if refitted is None:  # the first training is kept, and its validation split was not trained on
            ready.refits = Choice(False, "the mean of the trainings was worse on the validation split")
            saving.record_examples(prepared, output_dir, is_resumed=False)
    write = partial(write_errors, prepared, trainer, ready.nearest)
    change = change_of(refitting.calibrated(calibration, refitted if "test" in ready.splits else None), adjustment)
    results = measured(trainer, ready.splits, prepared.data, validation, write, change)
    saving.save_config(trainer, output_dir)  # with thresholds and conformal scores
    results[refitting.KEY] = refitting.results_of(ready.refits, refitted)
    results["calibrate"] = ready.calibrates.to_dict()
    results["calibration"] = refitting.calibration_of(calibration, refitted)
    results[adjusting.KEY] = {**adjustment.to_dict(), "split": "validation"} if adjustment else None
    results |= facts_of(config, task, prepared.data, trainer) | prepared.chosen.to_dict()
    results["data_facts"] = prepared.facts.to_dict()
    results["preflight"] = ready.preflight.to_dict() if ready.preflight else None
    forgotten = ready.watching.finish(output_dir) if ready.watching else None
    results |= ready.found | {NEAREST: ready.nearest.to_dict(), "forgetting": forgotten}
    results[outcome.KEY] = adapted(prepared, trainer, ready.splits["validation"], ready.selection, ready.domains)
    results["card"] = card.facts(
        config.values,
        prepared.data,
        base_of(config, trainer.model),
        results["metrics_split"],
        model_origin=prepared.loaded.origin,
        data_origin=prepared.source.origin,
    )
    saving.check_saved(trainer, task, config, labels)
    end_workers(trainer)
    if trainer.is_world_process_zero():  # last: it marks a finished run
        write_json(output_dir / RESULTS, results)
        card.write(output_dir)
        saving.forget_replaced(output_dir)
    return Result.of(prepared, trainer, output_dir, results)


def _calibrate(ready: _Ready) -> Calibration | None:
    """Calibrate the trained model, if `calibrate` came to that; `auto` does not where the model has diverged."""
    if not ready.calibrates.value:
        return None
    try:
        return calibrate(ready.trainer, ready.splits["validation"], ready.output_dir)
    except WorkFailed as error:
        if ready.trainer.args.calibrate is True:
            raise
        ready.calibrates = Choice(False, error.message.rstrip("."))
        if ready.trainer.is_world_process_zero():
            _write_run_file(ready)  # a run that repeats this one must not ask for it
        return None
