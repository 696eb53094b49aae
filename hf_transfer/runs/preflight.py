"""Preflight: what would fail after hours of training is tried before the first step.

An evaluation batch of every split, training steps on the longest and the shortest real example, the last batch with its
true size, and saving and loading. Everything goes through the trainer's own functions. The model and all random numbers
are afterwards as they were, so that a run with a preflight equals one without, bit for bit. A failure is a `UserError`
with the key to change.

Nothing in here waits for other processes, because one that has failed would leave them waiting; they compare their
results at the end.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, gather_object
from torch import nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_numpify

from hf_transfer.errors import UserError
from hf_transfer.features.batches import Batch, count_of
from hf_transfer.layers.side_effects import untouched
from hf_transfer.runs.preflight_errors import ONE_VALUE, explained, no_gradient, not_finite, one_value
from hf_transfer.runs.preflight_examples import Examples, check_tokens, examples_of
from hf_transfer.runs.preflight_saving import check_saving, why_not
from hf_transfer.runs.preflight_stages import BatchSizes, Step, batch_sizes_and_steps, covering
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training.trainer import TransferTrainer
from hf_transfer.training.trial import training_pass

_MOST_ON_CPU = 32  # examples in a batch: more take seconds, and only a device can run out of memory unnoticed


@dataclass
class Preflight:
    """What was tried before training.

    Attributes:
        done: what was tried, and did not fail.
        notes: what was not tried, and why.
        seconds: that it took.
    """

    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """For display."""
        checks = f"{len(self.done)} check{'' if len(self.done) == 1 else 's'}"
        lines = [f"Preflight: {checks} in {self.seconds:.1f} s: {', '.join(self.done)}."] if self.done else []
        return [*lines, *(f"Preflight: {note}." for note in self.notes)]

    def to_dict(self) -> dict[str, Any]:
        return {"checks": self.done, "notes": self.notes, "seconds": self.seconds}


def try_run(
    prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], output_dir: Path | None = None
) -> Preflight:
    """Try everything that a run will do, once; called by all processes.

    Args:
        prepared: data and model.
        trainer: made for them, before its first step.
        splits: prepared examples by split.
        output_dir: where saving is tried; None to leave that out.

    Raises:
        UserError: the run would fail, in this process or another one.
    """
    began, failure = time.perf_counter(), None
    attempt = _Attempt(prepared, trainer, splits)
    try:
        with without_trace(trainer):
            try:
                attempt.run(output_dir)
            except UserError as error:
                failure = error
    except RuntimeError:  # a GPU that has failed cannot be read any more
        if failure is None:
            raise
    _agree(trainer, failure)
    attempt.result.seconds = time.perf_counter() - began
    return attempt.result


class _Attempt:
    """The checks, in the order of their cost."""

    def __init__(self, prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any]):
        self.prepared, self.trainer = prepared, trainer
        self.splits = examples_of(prepared, trainer, splits)
        self.result = Preflight()

    def run(self, output_dir: Path | None) -> None:
        """Raises:
        UserError: a check failed.
        """
        trainer, done = self.trainer, self.result.done
        texts = [split for split in self.splits.values() if split.lengths is not None]
        if texts:
            check_tokens(texts)
            done.append(f"the tokens of {_listed([split.name for split in texts])}")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            self.result.notes.append("no step was tried, because the model is sharded when training begins")
            return
        held_out = [split for name, split in self.splits.items() if name != "train"]
        for split in texts:
            self._answer_shortest(split)
        for split in held_out:
            self._evaluate(split)
        done.append(f"an evaluation batch of {_listed([split.name for split in held_out])}")
        if trainer.args.probe_solver != "lbfgs":  # which takes no training step
            self._train()
        if output_dir is not None:
            self._save(output_dir)

    # ---- evaluation ----

    def _evaluate(self, split: Examples) -> None:
        """An evaluation batch with the longest and the shortest text, and its metrics."""
        numbers = split.first(self._batch_size(self.trainer.args.per_device_eval_batch_size))
        batch = split.batch(numbers)
        with explained(split, numbers, batch, "an evaluation batch"):
            loss, logits, labels = self._predict(batch)
            if self.trainer.compute_metrics is not None:
                self.trainer.compute_metrics(EvalPrediction(nested_numpify(logits), nested_numpify(labels)))
        self._check_finite(split, numbers, [loss])

    def _answer_shortest(self, split: Examples) -> None:
        """The shortest text alone, without padding."""
        numbers = split.extremes[-1:]
        batch = split.batch(numbers, alone=True)
        with explained(split, numbers, batch, "the shortest text alone"):
            self._predict(batch)

    def _predict(self, batch: Batch) -> Any:
        """(loss, logits, labels)"""
        self.trainer.model.eval()
        with self.trainer.accelerator.autocast():
            predicted = self.trainer.prediction_step(self.trainer.model, batch, prediction_loss_only=False)
        return convert_to_fp32(predicted)

    def _batch_size(self, wanted: int) -> int:
        """At most what one device gets; DataParallel splits a batch among several."""
        args = self.trainer.args
        most = _MOST_ON_CPU if args.device.type == "cpu" else wanted
        return min(wanted, most, args.per_device_train_batch_size if args.n_gpu > 1 else wanted)

    # ---- training ----

    def _train(self) -> None:
        train = self.splits["train"]
        sizes, steps = batch_sizes_and_steps(self.trainer)
        numbers, reached = train.extremes, set[str]()
        for step in covering(steps):
            for part in [numbers] if sizes.full > 1 else [[number] for number in numbers]:
                reached |= self._train_on(step, part, sizes, f"a training step{step.where}")
        for step in steps:
            if not step.parameters & reached:
                raise no_gradient(self.prepared, step)
        widest = max(steps, key=lambda step: len(step.parameters))
        if train.lengths is None:
            self.result.done.append("a training step")
        else:
            longest, shortest = (int(train.lengths[number]) for number in (numbers[0], numbers[-1]))
            ends = f"({longest} and {shortest} tokens)"
            self.result.done.append(f"a training step on the longest and the shortest text {ends}")
        if self._fills_memory:
            self._train_on(widest, train.longest(sizes.full), sizes, "a training batch of the longest examples")
            self.result.done.append(f"a batch of the {sizes.full} longest examples")
        self._train_on_last(train, sizes, steps)

    @property
    def _fills_memory(self) -> bool:
        """Whether a whole batch shows what memory training takes."""
        args = self.trainer.args
        return (
            args.device.type != "cpu"
            and args.n_gpu <= 1
            and not (args.auto_find_batch_size or checkpoints_activations(args))
        )

    def _train_on_last(self, train: Examples, sizes: BatchSizes, steps: Sequence[Step]) -> None:
        """The last batch of an epoch, if it is smaller than the others, or if all batches are of one example.

        A batch of one is tried in every stage that trains other BatchNorm layers than those before it: they cannot
        normalize a single value per channel.
        """
        ending = [step for step in steps if step.reaches_end or sizes.full == 1]
        if not ending or (sizes.last == sizes.full and sizes.full > 1):
            return
        widest = max(ending, key=lambda step: len(step.parameters))
        tried, count = set[nn.Module](), min(sizes.last, len(train))
        numbers = train.extremes[-1:] if count == 1 else list(range(self._batch_size(count)))
        for step in ending if count == 1 else ():
            if not step.batch_norms <= tried:
                tried |= step.batch_norms
                self._train_on(step, numbers, sizes, f"the last batch of an epoch{step.where}")
        if not tried:
            self._train_on(widest, numbers, sizes, "the last batch of an epoch")
        if sizes.full > 1:
            self.result.done.append(f"the last batch of {count}")

    def _train_on(self, step: Step, numbers: list[int], sizes: BatchSizes, what: str) -> set[str]:
        """Names of the parameters that a training step on these examples gives a gradient."""
        train = self.splits["train"]
        batch = train.batch(numbers)
        with step.training(), explained(train, numbers, batch, what):
            names = [name for name, p in self.trainer.model.named_parameters() if p.requires_grad]
            try:
                loss, _, gradients = training_pass(self.trainer, batch)
            except ValueError as error:
                if count_of(batch) == 1 and ONE_VALUE in str(error):
                    raise one_value(self.trainer, step, sizes, len(train)) from error
                raise
        scaled = self.trainer.args.fp16  # its scaler skips steps whose gradient overflows
        self._check_finite(train, numbers, [loss, *(g for g in gradients if g is not None and not scaled)])
        return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}

    def _check_finite(self, split: Examples, numbers: list[int], values: Sequence[Any]) -> None:
        """Raises:
        UserError: the loss or a gradient is NaN or infinite, and the run would stop there.
        """
        if all(value is None or bool(torch.isfinite(value).all()) for value in values):
            return
        error = not_finite(split, numbers, is_loss=not bool(torch.isfinite(values[0])))
        if self.trainer.args.on_nonfinite == "stop":
            raise error
        self.result.notes.append(error.problem.rstrip("."))

    # ---- saving ----

    def _save(self, output_dir: Path) -> None:
        if not self.prepared.task.auto_class or not self.trainer.is_world_process_zero():
            return
        if why := why_not(self.trainer, output_dir):
            self.result.notes.append(f"saving was not tried, because {why}")
            return
        check_saving(self.prepared, self.trainer, output_dir)
        self.result.done.append("saving and loading")


def checkpoints_activations(args: Any) -> bool:
    """Whether training recomputes activations. The argument was renamed in a later version of transformers."""
    return any(vars(args).get(name) for name in ("activation_checkpointing", "gradient_checkpointing"))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@contextlib.contextmanager
def without_trace(trainer: TransferTrainer) -> Iterator[None]:
    """Context after which model, trainer and random numbers are as they were, and in which no process waits."""
    args, accelerator, objective, guards = trainer.args, trainer.accelerator, trainer.objective, trainer.guards
    counts_all, num_examples, recorder = args.average_tokens_across_devices, objective.num_examples, guards.recorder
    loaders = list(accelerator._dataloaders)
    args.average_tokens_across_devices = False  # else each batch asks all processes for its size
    try:
        with untouched(trainer.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run repeats them
            yield
    finally:
        args.average_tokens_across_devices = counts_all
        accelerator._dataloaders[:] = loaders
        objective.num_examples, guards.recorder = num_examples, recorder
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(args.device)


def _agree(trainer: TransferTrainer, failure: UserError | None) -> None:
    """Raises:
    UserError: some process has failed.
    """
    if trainer.args.world_size > 1:
        own = None if failure is None else (failure.problem, failure.fix, failure.key)
        others = [one for one in gather_object([own]) if one is not None]
        if failure is None and others:
            failure = UserError(*others[0])
    if failure is not None:
        raise failure
