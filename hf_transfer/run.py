"""A fine-tuning run, from keys to a folder that loads anywhere."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import sys
import warnings
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from . import card, checkpoint, push
from .adapter_files import check_reload
from .adapters import is_adapted, name_of
from .card import RESULTS
from .config import Config, DataArguments
from .data.labels import MULTI_LABEL
from .data.load import IN_MEMORY
from .data.memory import splits_of
from .data.splits import Data
from .errors import UserError, WorkFailed, nearest
from .guards import NONFINITE
from .models import Labels
from .plan import Plan
from .predictor import RUN_FILE, Predictor, finite, format_metrics, held_out_metrics, tune_thresholds, without_speed
from .preparation import (
    announce,
    check_writable,
    end_workers,
    fit_the_machine,
    make_trainer,
    prepare,
    prepare_splits,
    quiet_libraries,
)
from .progress import Bars, History, Lines, say
from .staging import refuse_local
from .tasks import Task
from .trainer import TransferArguments, TransferTrainer
from .views import Views

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
        push_error: why `push_to_hub: true` did not push; the run is whole all the same.
    """

    output_dir: Path
    results: dict[str, Any]
    plan: Plan | None
    trainer: TransferTrainer
    predictor: Predictor
    push_error: WorkFailed | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the test split where there is one, else of the validation split."""
        return self.results["metrics"]

    @property
    def model(self) -> Any:
        return self.trainer.model

    def predict(
        self, inputs: Any, top_k: int | None = None, features: bool = False, **views: Any
    ) -> list[dict[str, Any]]:
        """An answer per input: see `Predictor.predict`; `tta`, `stride` and `pool` as in `Views`."""
        return self.predictor.looking(**views).predict(inputs, top_k, features)

    def evaluate(
        self, dataset_name: str | None = None, split: str | None = None, max_examples: int | None = None, **keys: Any
    ) -> dict[str, Any]:
        """Metrics on labelled data, by default on what the run held out: see `Predictor.evaluate`.

        Args:
            dataset_name: hub id, file, folder or `bundled:<name>`.
            split: which of its splits.
            max_examples: only so many of them, drawn by class.
            **keys: other data keys, for example `test_file` or `label_column_name`; `tta`, `stride` and `pool` as in
                `Views`.

        Raises:
            UserError: there is no such data or key, or the labels are not the model's.
        """
        looking = self.predictor.looking(**{f.name: keys.pop(f.name) for f in fields(Views) if f.name in keys})
        known = [f.name for f in fields(DataArguments)]
        for name in keys:
            if name not in known:
                raise UserError(f"{name} is no key of data.{nearest(name, known)}")
        if dataset_name is None and "test_file" not in keys:
            own = replace(looking, data=replace(looking.data, **keys))
            return own.evaluate(split=split, max_examples=max_examples)
        data = looking.other_data(dataset_name=dataset_name, **keys)
        return looking.evaluate(data, split, max_examples)

    def push_to_hub(
        self,
        hub_model_id: str | None = None,
        merged: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
    ) -> push.Pushed:
        """Push the run to a hub, after checking that what is pushed answers as the trained model.

        Args:
            hub_model_id: `owner/name`, or a name of the account's own (default: that of `output_dir`).
            merged: a plain model, the adapter in its weights.
            revision: branch (default: main).
            commit_message: of the commit.
            private: of a repository that is made (default: private).

        Raises:
            UserError: it is no id, or the adapter's backbone is a folder of this machine.
            WorkFailed: the hub or the connection failed; the run is as it was.
        """
        target = push.Target(hub_model_id, merged, revision, commit_message, private)
        return push.push(self.output_dir, target, self.predictor.model)

    def save(self, folder: str | Path, merged: bool = False) -> Path:
        """Write the model, with its tokenizer or image processor, to another folder, as `output_dir` holds it.

        Args:
            folder: is made.
            merged: put what an adapter learnt into the weights of its backbone: a plain model, for any library.

        Raises:
            UserError: its kind of adapter cannot be merged.
            WorkFailed: the merged weights answer otherwise than the adapter.
        """
        if merged:
            return self.predictor.save_merged(folder, probe(self.trainer))
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


def fine_tune(model_name_or_path: str, dataset_name: Any = None, **keys: Any) -> Result:
    """Fine-tune a pretrained model on a data set.

    Args:
        model_name_or_path: hub id, local folder, `timm/<name>` or `bundled:<name>`.
        dataset_name: hub id, file, folder or `bundled:<name>`; or the data itself: a `datasets.Dataset`, a
            `DatasetDict`, a pandas frame, or a mapping of split names to these. Or give `train_file`.
        **keys: any key of `hf-transfer train`.

    Raises:
        UserError: the keys, the model or the data are not right; all problems of the keys are in one message.
    """
    given = {"model_name_or_path": model_name_or_path, **keys}
    if dataset_name is None or isinstance(dataset_name, str | Path):
        return run(Config.from_sources({}, {**given, "dataset_name": dataset_name}))
    config = Config.from_sources({}, {**given, "dataset_name": IN_MEMORY})
    return run(replace(config, data=replace(config.data, in_memory=splits_of(dataset_name))))


def run(config: Config) -> Result:
    """Run a configuration: data, model, plan, training, evaluation, files."""
    args = config.training
    output_dir = Path(str(args.output_dir))
    resumed = _checkpoint(config, output_dir)
    check_writable(output_dir)
    target, args.push_to_hub = push.wanted(config.values), False  # Trainer's own way needs the hub to begin
    doubt = push.before_training(target, output_dir) if target else ""
    fit_the_machine(args)
    set_seed(args.seed)
    talks = _talks(args)
    with quiet_libraries(args):
        prepared = prepare(config)
        config, task, data, labels = prepared.config, prepared.task, prepared.data, prepared.loaded.labels
        splits = prepare_splits(prepared)
        trainer = make_trainer(prepared, splits["train"], splits["validation"])
        if target and is_adapted(trainer.model):
            refuse_local(str(_base(config, trainer.model)))
        trainer.boundary.decide()
        _replace_progress(trainer, output_dir, talks)
        if trainer.is_world_process_zero():
            if talks:
                announce(prepared, trainer)
            if doubt:
                sys.stderr.write(f"{doubt}\n")
            if config.data.overwrite_output_dir and resumed is None:
                _clear(output_dir)
            _write(output_dir / RUN_FILE, config.to_yaml())

        trainer.train(resume_from_checkpoint=resumed)
        save_model(trainer, output_dir)  # before it is evaluated: what fails there does not cost the training
        if args.tune_thresholds and labels.problem_type == MULTI_LABEL:
            tune_thresholds(trainer, splits["validation"])
            if trainer.is_world_process_zero():
                trainer.model.config.save_pretrained(output_dir)
        results = _evaluate(trainer, splits, labels.problem_type)
        results |= _facts(config, task, data, trainer)
        results["data_facts"] = prepared.facts.to_dict()
        results["card"] = card.facts(config.values, data, _base(config, trainer.model), results["metrics_split"])
        check_saved(trainer, task, config, labels)
        end_workers(trainer)
        if trainer.is_world_process_zero():  # last: it marks a finished run
            _write(output_dir / RESULTS, json.dumps(finite(results), indent=2, allow_nan=False) + "\n")
            card.write(output_dir)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    batch_size, seed = args.per_device_eval_batch_size, config.split_seed
    predictor = Predictor(task, trainer.model, prepared.processor, labels, config.data, batch_size, precision, seed)
    result = Result(output_dir, results, trainer.plan, trainer, predictor)
    if trainer.is_world_process_zero() and talks:
        _conclude(result, task)
    if target and trainer.is_world_process_zero():
        result.push_error = _push(result, target, talks)
    return result


def _push(result: Result, target: push.Target, talks: bool) -> WorkFailed | None:
    """Push a finished run; what went wrong, if anything."""
    try:
        with quiet_libraries(result.trainer.args):
            done = push.push(result.output_dir, target, result.model)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return WorkFailed(error.message, error.fix)
    if talks:
        say("\n".join(done.lines()))
    return None


def _talks(args: TransferArguments) -> bool:
    """Whether the run says what it does: not from `log_level: error` on."""
    return args.log_level not in ("error", "critical")


def _clear(output_dir: Path) -> None:
    """Remove what an earlier run left and this one would mix up with its own."""
    for name in (RESULTS, HISTORY, NONFINITE):
        (output_dir / name).unlink(missing_ok=True)
    for folder in (*checkpoint.checkpoints(output_dir), *output_dir.glob(f"{checkpoint.BROKEN}checkpoint-*")):
        shutil.rmtree(folder)


def _replace_progress(trainer: TransferTrainer, output_dir: Path, talks: bool) -> None:
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    if talks and sys.stderr.isatty():
        trainer.add_callback(Bars())
    if talks:
        trainer.add_callback(Lines(trainer))
    trainer.add_callback(History(trainer, output_dir / HISTORY))


def _checkpoint(config: Config, output_dir: Path) -> str | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: the folder holds a finished run, or an unfinished one that nobody asked to resume.
    """
    wanted = config.training.resume_from_checkpoint
    saved = checkpoint.checkpoints(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: {str(output_dir)!r} is a file, not a folder.")
    if config.data.overwrite_output_dir and wanted is None:
        return None
    if (output_dir / RESULTS).is_file() and not config.data.overwrite_output_dir:
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds a finished run.",
            "Choose another folder, or add --overwrite_output_dir.",
        )
    if wanted is not None and wanted != "auto":
        return str(checkpoint.checked(wanted))
    if wanted is None and saved:
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds an unfinished run.",
            "Continue it with --resume_from_checkpoint auto, or start over with --overwrite_output_dir.",
        )
    return wanted if saved else None


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
        "confusion": found["confusion"],
    }


def _facts(config: Config, task: Task, data: Data, trainer: TransferTrainer) -> dict[str, Any]:
    """The rest of `results.json`: what was run, on what, and what it took."""
    plan, args, seconds = trainer.plan, config.training, trainer.seconds
    seen = len(data.train) * (trainer.state.epoch or 0)
    if config.data.streaming:
        seen = trainer.state.global_step * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
    return {
        "task": task.name,
        "problem_type": data.labels.problem_type,
        "model": config.model.model_name_or_path,
        "strategy": plan.strategy if plan is not None else None,
        "adapter": name_of(args, trainer.model),
        "dataset": config.data.dataset_name or config.data.train_file,
        "labels": list(data.labels.names),
        "num_train_examples": seen if config.data.streaming else len(data.train),
        "plan": plan.to_list() if plan is not None else [],
        **({"probe": trainer.solution.to_dict()} if trainer.solution is not None else {}),
        "stages": [
            {**record.to_dict(), "cache": trainer.boundary.summary(i)} for i, record in enumerate(trainer.stage_records)
        ],
        "train_seconds": seconds,
        "train_samples_per_second": seen / max(seconds, 1e-9),
        "trainable_parameters": sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]),
        "total_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": args.seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS}},
        "device": torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{args.device.type} ({_processor()})",
        "cost": {"device_hours": seconds * args.world_size / 3600},
    }


def _base(config: Config, model: Any) -> str | None:
    """What the model was made from: of an adapter its backbone; nothing where the weights were random."""
    if is_adapted(model):
        return model.active_peft_config.base_model_name_or_path
    return None if config.model.from_scratch else config.model.model_name_or_path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _processor() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def check_saved(trainer: TransferTrainer, task: Task, config: Config, labels: Labels) -> None:
    """Load what was saved, under another seed, and compare its answers with the trained model's.

    Raises:
        WorkFailed: they differ.
    """
    if not task.auto_class or not trainer.is_world_process_zero():
        return
    folder = str(config.training.output_dir)
    saved = replace(
        config.model, model_name_or_path=folder, model_revision="main", restart_adapter=False, from_scratch=False
    )
    own = replace(config.data, image_size=None, max_seq_length=None)  # what was saved holds them
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.args.seed + 1)
        try:
            again, _ = task.load(saved, own, labels)
        except UserError as error:
            raise WorkFailed(f"The model that was just saved cannot be loaded: {error}") from error
    check_reload(trainer.model, again.model, probe(trainer), folder)


def probe(trainer: TransferTrainer) -> dict[str, Any]:
    """A small batch of what was held out, without labels."""
    examples: Any = trainer.eval_dataset
    batch = trainer.data_collator([examples[i] for i in range(min(4, len(examples)))])
    return {k: v for k, v in batch.items() if k != "labels"}


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


def _write(path: Path, text: str) -> None:
    """Write beside and rename, so that the file is whole at every instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


# ---- what the user reads -------------------------------------------------------------------------------------------


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
    what = "texts" if not task.suffixes else "paths of images"
    say(f"  {ours} predict {shlex.quote(str(folder))} -   # answers {what} from standard input, a line each")
    say(f"  {ours} evaluate {shlex.quote(str(folder))}   # these metrics again; --test_file for others")
    say(f"  {ours} train --config {recipe} --output_dir {again}   # repeats the run")
    if task.auto_class and is_adapted(result.model):
        code = (
            f"import transformers as t, peft; c = peft.PeftConfig.from_pretrained({json.dumps(str(folder))}); "
            f"m = t.{task.auto_class}.from_pretrained(c.base_model_name_or_path, "
            f"config=t.AutoConfig.from_pretrained({json.dumps(str(folder))}), ignore_mismatched_sizes=True); "
            f"print(peft.PeftModel.from_pretrained(m, {json.dumps(str(folder))}).config.id2label)"
        )
        say(f"  {python} -c {shlex.quote(code)}")
    elif task.auto_class:
        load = f"M.from_pretrained({json.dumps(str(folder))})"
        code = f"from transformers import {task.auto_class} as M; print({load}.config.id2label)"
        say(f"  {python} -c {shlex.quote(code)}")


def _python() -> str:
    """How to call this interpreter from here."""
    if shutil.which("python") == sys.executable:
        return "python"
    beside = os.path.relpath(sys.executable)
    return sys.executable if beside.startswith("..") else beside
