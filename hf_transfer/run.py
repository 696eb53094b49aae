"""A fine-tuning run, from keys to a folder that loads anywhere."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, set_seed
from transformers import logging as transformers_logging
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from .config import Config
from .data.load import Data, infer_labels, label_column, load_splits, make_data
from .errors import UserError, WorkFailed, nearest, one_line
from .metrics import names as metric_names
from .plan import Plan
from .predictor import RUN_FILE, Predictor, format_metrics, held_out_metrics, metrics_of, without_speed
from .progress import Bars, History, Lines, say
from .tasks import Task, choose_task
from .trainer import TransferArguments, TransferTrainer

RESULTS = "results.json"
HISTORY = "history.jsonl"
_VERSIONS = ("torch", "transformers", "accelerate", "datasets", "peft", "timm", "torchvision")


@dataclass
class Result:
    """A finished run.

    Attributes:
        output_dir: the folder with the model and the files of the run.
        results: what `results.json` holds.
        plan: the plan that was executed; None without a strategy.
        trainer: with the trained model.
        predictor: the trained model at work.
    """

    output_dir: Path
    results: dict[str, Any]
    plan: Plan | None
    trainer: TransferTrainer
    predictor: Predictor

    @property
    def metrics(self) -> dict[str, float]:
        """Of the test split where there is one, else of the validation split."""
        return self.results["metrics"]

    @property
    def model(self) -> Any:
        return self.trainer.model

    def predict(self, inputs: Any, top_k: int | None = None, features: bool = False) -> list[dict[str, Any]]:
        """An answer per input: see `Predictor.predict`."""
        return self.predictor.predict(inputs, top_k, features)

    def evaluate(self, dataset_name: str | None = None, split: str | None = None, **keys: Any) -> dict[str, Any]:
        """Metrics on labelled data, by default on what the run held out: see `Predictor.evaluate`.

        Args:
            dataset_name: hub id, file, folder or `bundled:<name>`.
            split: which of its splits.
            **keys: other data keys, for example `test_file` or `label_column_name`.

        Raises:
            UserError: there is no such data, or its labels are not the model's.
        """
        if dataset_name is None and not keys:
            return self.predictor.evaluate(split=split)
        return self.predictor.evaluate(self.predictor.other_data(dataset_name=dataset_name, **keys), split)

    def save(self, folder: str | Path) -> Path:
        """Write the model, with its tokenizer or image processor, to another folder, as `output_dir` holds it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self.trainer, Path(folder))
        return Path(folder)

    def __repr__(self) -> str:
        results = self.results
        found = format_metrics(self.metrics, results["intervals"])
        count = len(self.plan.stages) if self.plan is not None else 0
        stages = f", {count} stage{'' if count == 1 else 's'}" if count else ""
        return "\n".join(
            [
                f"Result of {results['model']} on {results['dataset']} ({results['strategy']}{stages}, "
                f"{results['train_seconds']:.0f} s of training) in {self.output_dir}",
                f"{results['metrics_split']}:",
                *found,
            ]
        )


def fine_tune(model_name_or_path: str, dataset_name: str | None = None, **keys: Any) -> Result:
    """Fine-tune a pretrained model on a data set.

    Args:
        model_name_or_path: hub id, local folder, `timm/<name>` or `bundled:<name>`.
        dataset_name: hub id, file, folder or `bundled:<name>`; or give `train_file`.
        **keys: any key of `hf-transfer train`.

    Raises:
        UserError: the keys, the model or the data are not right; all problems of the keys are in one message.
    """
    return run(
        Config.from_sources({}, {"model_name_or_path": model_name_or_path, "dataset_name": dataset_name, **keys})
    )


def run(config: Config) -> Result:
    """Run a configuration: data, model, plan, training, evaluation, files."""
    args = config.training
    output_dir = Path(str(args.output_dir))
    checkpoint = _checkpoint(config, output_dir)
    _check_writable(output_dir)
    _fit_the_machine(args)
    set_seed(args.seed)
    with _quiet_libraries(args):
        with args.main_process_first(desc="data"):
            splits = load_splits(config.data)
        task, inputs = choose_task(splits["train"].features, config.data)
        column = label_column(splits["train"].features, inputs, config.data)
        labels = infer_labels(splits["train"], column, config.data.problem_type)
        loaded, processor = task.load(config.model, config.data, labels)
        labels = loaded.labels
        data = make_data(splits, inputs, column, labels, config.data, args.data_seed or args.seed)
        _check_best(args, labels.problem_type, len(labels.names))
        _check_batches(args, len(data.train))
        prepared = {n: task.prepare(split, inputs, processor, config.data) for n, split in data.splits.items()}
        seen: dict[str, Any] = {"task": task.name, "problem_type": labels.problem_type, "label_column_name": column}
        if task.input_key:
            seen[task.input_key] = list(inputs) if len(inputs) > 1 else inputs[0]
        config = config.resolved(**seen)

        args.layer_rules = [*(args.layer_rules or []), *loaded.layer_rules] or None
        with _trainers_refusals(output_dir):
            trainer = TransferTrainer(
                model=loaded.model,
                args=args,
                train_dataset=prepared["train"],
                eval_dataset=prepared["validation"],
                processing_class=processor,
                data_collator=task.collator(processor),
                compute_metrics=lambda p: metrics_of(labels.problem_type, p),
            )
            trainer.resolve_plan()
            trainer.check_optimization()
            _check_disk(output_dir, trainer)
        talks = _talks(args)
        _replace_progress(trainer, output_dir, talks)
        if trainer.is_world_process_zero():
            if talks:
                _announce(config, task, data, [*loaded.notes, *data.notes], trainer)
            if config.data.overwrite_output_dir and checkpoint is None:
                _clear(output_dir)
            _write(output_dir / RUN_FILE, config.to_yaml())

        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        results = _evaluate(trainer, prepared, labels.problem_type)
        results |= _facts(config, task, data, trainer, outcome.metrics)
        _save(trainer, output_dir, results)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    batch_size, seed = args.per_device_eval_batch_size, args.data_seed or args.seed
    predictor = Predictor(task, trainer.model, processor, labels, config.data, batch_size, precision, seed)
    result = Result(output_dir, results, trainer.plan, trainer, predictor)
    if trainer.is_world_process_zero() and talks:
        _conclude(result, task)
    return result


def _talks(args: TransferArguments) -> bool:
    """Whether the run says what it does: not from `log_level: error` on."""
    return args.log_level not in ("error", "critical")


@contextlib.contextmanager
def _quiet_libraries(args: TransferArguments) -> Iterator[None]:
    """No bar for every tokenised split and every file of weights: they hide the run's own lines."""
    if args.log_level in ("debug", "info"):
        yield
        return
    ours, theirs = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if not ours:
            datasets.enable_progress_bars()
        if theirs:
            transformers_logging.enable_progress_bar()


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


def _clear(output_dir: Path) -> None:
    """Remove what an earlier run left and this one would mix up with its own."""
    for name in (RESULTS, HISTORY):
        (output_dir / name).unlink(missing_ok=True)
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _replace_progress(trainer: TransferTrainer, output_dir: Path, talks: bool) -> None:
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    if talks and sys.stderr.isatty():
        trainer.add_callback(Bars())
    if talks:
        trainer.add_callback(Lines(trainer))
    trainer.add_callback(History(trainer, output_dir / HISTORY))


def _fit_the_machine(args: TransferArguments) -> None:
    """Pin memory only for a device; give a launched process on the CPU its share of the cores.

    `accelerate launch` gives it one thread where nobody chose a number: the same run took twice as long as under
    `hf-transfer train`.
    """
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if args.device.type == "cpu" and launched:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _checkpoint(config: Config, output_dir: Path) -> str | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: the folder holds a finished run, or an unfinished one that nobody asked to resume.
    """
    wanted = config.training.resume_from_checkpoint
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: {str(output_dir)!r} is a file, not a folder.")
    if config.data.overwrite_output_dir and wanted is None:
        return None
    if (output_dir / RESULTS).is_file() and not config.data.overwrite_output_dir:
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds a finished run.",
            "Choose another folder, or add --overwrite_output_dir.",
        )
    if wanted == "auto":
        return last
    if wanted is not None and not Path(wanted).is_dir():
        raise UserError(
            f"resume_from_checkpoint: there is no folder {wanted!r}.",
            "Give a checkpoint's folder, or auto for the newest one in output_dir.",
        )
    if wanted is None and last is not None:
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds an unfinished run.",
            "Continue it with --resume_from_checkpoint auto, or start over with --overwrite_output_dir.",
        )
    return wanted


def _check_writable(output_dir: Path) -> None:
    """Raises:
    WorkFailed: nothing can be written there.
    """
    existing = _existing(output_dir)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise WorkFailed(
            f"output_dir: nothing can be written to {str(existing)!r} ({error.strerror}).", "Choose another folder."
        ) from error


def _existing(path: Path) -> Path:
    """The nearest that there is, upwards."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _check_disk(output_dir: Path, trainer: TransferTrainer) -> None:
    """Whether the disk has room for the model and one more copy, which is written before an old one goes.

    Raises:
        WorkFailed: it has not.
    """
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    needed, free = 2 * size, shutil.disk_usage(_existing(output_dir)).free
    if free < needed:
        raise WorkFailed(
            f"output_dir: the disk of {str(output_dir)!r} has {free / 1e6:,.0f} MB left, and the run writes at least "
            f"{needed / 1e6:,.0f} MB.",
            "Make room, or choose an output_dir on another disk.",
        )


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


def _evaluate(trainer: TransferTrainer, prepared: dict[str, Any], problem_type: str) -> dict[str, Any]:
    """Metrics of the held-out splits, with intervals for the one that counts."""
    validation = without_speed(trainer.evaluate(), "eval_")
    split = "test" if "test" in prepared else "validation"
    found = held_out_metrics(trainer, prepared[split], problem_type)
    return {
        "metrics": found["metrics"],
        "metrics_split": split,
        "validation_metrics": validation,
        "intervals": found["intervals"],
    }


def _facts(
    config: Config, task: Task, data: Data, trainer: TransferTrainer, trained: dict[str, float]
) -> dict[str, Any]:
    """The rest of `results.json`: what was run, on what, and what it took."""
    plan, args = trainer.plan, config.training
    return {
        "task": task.name,
        "problem_type": data.labels.problem_type,
        "model": config.model.model_name_or_path,
        "strategy": plan.strategy if plan is not None else None,
        "adapter": "none",
        "dataset": config.data.dataset_name or config.data.train_file,
        "labels": list(data.labels.names),
        "num_train_examples": len(data.train),
        "plan": plan.to_list() if plan is not None else [],
        "stages": [{**record.to_dict(), "cache": None} for record in trainer.stage_records],
        "train_seconds": trained["train_runtime"],
        "train_samples_per_second": trained["train_samples_per_second"],
        "trainable_parameters": sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]),
        "total_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": args.seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS}},
        "device": torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{args.device.type} ({_processor()})",
        "cost": {"device_hours": trained["train_runtime"] * args.world_size / 3600},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _processor() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def _save(trainer: TransferTrainer, output_dir: Path, results: dict[str, Any]) -> None:
    """The model as plain `from_pretrained` reads it, and `results.json` last: it marks a finished run."""
    save_model(trainer, output_dir)
    if trainer.is_world_process_zero():
        _write(output_dir / RESULTS, json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")


def save_model(trainer: TransferTrainer, folder: Path) -> None:
    """Save beside and move: `folder` holds the whole model or, on a full disk, what it held before."""
    beside = folder / ".saving"
    try:
        trainer.save_model(str(beside))
        if trainer.is_world_process_zero():
            (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.yaml says the same in the open
            for path in beside.iterdir():
                path.replace(folder / path.name)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(beside, ignore_errors=True)


def _finite(value: Any) -> Any:
    """`value` with null for what JSON has no number for: a loss that diverged."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Write beside and rename, so that the file is whole at every instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


# ---- what the user reads -------------------------------------------------------------------------------------------


def _announce(config: Config, task: Task, data: Data, notes: Sequence[str], trainer: TransferTrainer) -> None:
    counts = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    say(f"{task.name}: {config.model.model_name_or_path} on {config.data.dataset_name or config.data.train_file}")
    say(
        f"Examples: {counts}. Labels: {', '.join(data.labels.names[:10])}"
        + (f" and {len(data.labels.names) - 10} more." if len(data.labels.names) > 10 else ".")
    )
    for note in notes:
        say(note)
    say()
    if trainer.plan is not None:
        if config.values["strategy"] == "auto" and config.values["stages"] is None:
            say(f"strategy auto: {trainer.plan.strategy} (overrule it with --strategy)")
        say(str(trainer.plan))
    else:
        say("No plan: every parameter that requires a gradient trains, as under transformers.Trainer.")
    say()


def _conclude(result: Result, task: Task) -> None:
    results, folder = result.results, result.output_dir
    say()
    say(
        f"Result on {results['metrics_split']} ({results['train_seconds']:.0f} s of training, "
        f"{results['trainable_parameters']:,} of {results['total_parameters']:,} parameters trained):"
    )
    for line in format_metrics(results["metrics"], results["intervals"]):
        say(line)
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    say(f"Files in {folder}: {', '.join(files)}")
    if any(not math.isfinite(v) for v in results["metrics"].values()):
        say("The loss is not a number: training diverged. Try a lower learning_rate.")
    python = shlex.quote(_python())
    ours = "hf-transfer" if shutil.which("hf-transfer") else f"{python} -m hf_transfer"
    say("Next:")
    recipe, again = shlex.quote(str(folder / RUN_FILE)), shlex.quote(f"{folder}-again")
    say(f"  {ours} train --config {recipe} --output_dir {again}   # repeats the run")
    if task.auto_class:
        load = f"M.from_pretrained({json.dumps(str(folder))})"
        code = f"from transformers import {task.auto_class} as M; print({load}.config.id2label)"
        say(f"  {python} -c {shlex.quote(code)}")


def _python() -> str:
    """How to call this interpreter from here."""
    if shutil.which("python") == sys.executable:
        return "python"
    beside = os.path.relpath(sys.executable)
    return sys.executable if beside.startswith("..") else beside
