"""A learning-rate range test on a run's own model and data, after which both are as they were before."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_transfer.analysis.range_test import Curve, Sweep, has_diverged, rates_between, smooth
from hf_transfer.errors import UserError
from hf_transfer.features.batches import Batch
from hf_transfer.plan.plan import Plan
from hf_transfer.runs.preflight import without_trace
from hf_transfer.runs.preflight_errors import explained
from hf_transfer.runs.preflight_examples import Examples, examples_of
from hf_transfer.runs.preflight_stages import Step, batch_sizes_and_steps
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training import linear_probe
from hf_transfer.training.trainer import TransferTrainer


def stage_to_try(plan: Plan, wanted: int | None) -> int:
    """The number of a stage: the first that trains what is below the head, which `learning_rate` is the rate of.

    A head that trains alone before it has a learning rate of its own, or a fixed multiple of this one.

    Raises:
        UserError: there is no such stage.
    """
    if wanted is None:
        backbone = {name for name, _ in plan.groups[:-1]}
        return next((i for i, stage in enumerate(plan.stages) if backbone & set(stage.trainable)), 0)
    if not 0 <= wanted < len(plan.stages):
        names = ", ".join(f"{i + 1} ({stage.name})" for i, stage in enumerate(plan.stages))
        raise UserError(f"there is no stage {wanted + 1}.", f"The stages are {names}.", key="stage")
    return wanted


def check_testable(trainer: TransferTrainer, is_streamed: bool, sweep: Sweep) -> None:
    """Raises:
    UserError: a range test is not possible with these keys, or says nothing.
    """
    args = trainer.args
    if args.probe_solver == "lbfgs":
        raise UserError(
            "probe_solver: lbfgs solves for the head and takes no steps, so there is no learning rate to find.",
            "Use probe_solver: sgd, or leave the search out.",
        )
    if is_streamed:
        raise UserError(
            "the range test draws its batches from the whole training set, and streaming has not read it.",
            "Run it on a part without streaming (max_train_samples), and give the learning rate.",
            key="streaming",
        )
    if args.contrastive_epochs:
        raise UserError(
            "the range test would try the model as it is before the contrastive stage, which changes it.",
            "Give learning_rate as a number, or set contrastive_epochs: 0.",
            key="contrastive_epochs",
        )
    if trainer.objective.trained:
        raise UserError(
            "the range test would train the discriminator too, which it cannot undo.",
            "Search without domain_adaptation, and give learning_rate as a number.",
            key="domain_adaptation",
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "the range test needs the whole model in each process, and FSDP and DeepSpeed shard it.",
            "Run find-lr on one GPU or with plain DDP, and give the learning rate.",
            key="learning_rate",
        )
    if not args.learning_rate:
        raise UserError(
            "0 has no ratio to the learning rates of other groups.", "Leave it out, or give one.", key="learning_rate"
        )
    sweep.check()


def range_test(prepared: Prepared, trainer: TransferTrainer, splits: dict[str, Any], sweep: Sweep) -> Curve:
    """The loss of a stage's training steps at a rising learning rate.

    The groups keep the ratios of their learning rates, and what is raised is the factor that they have in common. The
    steps are those of the run: its batches, loss, optimizer, clipping and precision; each process takes its share of
    the batches. Weights, buffers, random numbers and the order of the data are afterwards as they were.

    Args:
        prepared: the run.
        trainer: with its plan resolved.
        splits: prepared examples by split.
        sweep: the learning rates.

    Raises:
        UserError: there is nothing to find, a batch cannot be trained on, or the loss is NaN or infinite at the first
            step.
    """
    check_testable(trainer, prepared.config.data.streaming, sweep)
    assert trainer.plan is not None, "checked by the callers"
    index = stage_to_try(trainer.plan, sweep.stage)
    with without_trace(trainer), _restored(trainer):
        train = examples_of(prepared, trainer, splits)["train"]
        step = batch_sizes_and_steps(trainer)[1][index]
        if trainer.args.head_init == "probe":  # the run begins with this head
            linear_probe.solve(trainer)
        optimizer = trainer.create_optimizer()
        with step.training():
            return _swept(_Steps(trainer, train, step, index, optimizer), sweep)


@contextlib.contextmanager
def _restored(trainer: TransferTrainer) -> Iterator[None]:
    """Context after which the parameters, and what of them requires a gradient, are as they were."""
    parameters = list(trainer.model.parameters())
    flags = [p.requires_grad for p in parameters]
    named = dict(trainer.model.named_parameters())
    values = [(named[name], named[name].detach().to("cpu", copy=True)) for name in trainer.trainable]
    try:
        yield
    finally:
        trainer.optimizer = None
        with torch.no_grad():
            for parameter, before in values:
                parameter.copy_(before)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


def _swept(steps: _Steps, sweep: Sweep) -> Curve:
    rates = rates_between(sweep.start, sweep.end, sweep.steps)
    losses: list[float] = []
    for rate, batches in zip(rates, steps.batches(sweep.steps), strict=True):
        loss = steps.take(rate, batches)
        if not math.isfinite(loss) and not losses:
            raise UserError(
                f"the loss is {loss} at the first step already, before any weight has changed.",
                "Check the labels and the precision (fp16, bf16): a lower learning rate does not change it.",
                key="learning_rate",
            )
        losses.append(loss)
        if has_diverged(list(smooth(losses))):
            finite = [loss for loss in losses if math.isfinite(loss)]
            return Curve(tuple(rates[: len(finite)]), tuple(finite), diverged=True)
    return Curve(tuple(rates), tuple(losses))


@dataclass
class _Steps:
    """The training steps of a range test.

    Attributes:
        trainer: whose steps they are.
        train: the training examples.
        step: of the stage that is tried.
        index: its number.
        optimizer: of all groups, with `rates` by stage.
    """

    trainer: TransferTrainer
    train: Examples
    step: Step
    index: int
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        args = self.trainer.args
        self.base = args.learning_rate
        self.parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.fp16 and args.device.type != "cpu")

    def batches(self, steps: int) -> Iterator[list[list[int]]]:
        """For each step the numbers of the examples in this process's micro-batches, in the order of the run."""
        loader, wanted = self.trainer.get_train_dataloader(), self.trainer.args.gradient_accumulation_steps
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            micro_batches = iter([list(numbers) for numbers in loader.batch_sampler])
            while accumulated := list(itertools.islice(micro_batches, wanted)):
                yield accumulated
                if not (steps := steps - 1):
                    return

    def take(self, rate: float, numbers: Sequence[list[int]]) -> float:
        """The loss before a training step at a learning rate; NaN or infinite without the step."""
        trainer = self.trainer
        for group in self.optimizer.param_groups:
            group["lr"] = group["rates"][self.index] * rate / self.base
        batches = [self._batch(part) for part in numbers]
        own = [number for number in numbers[0] if number < len(self.train)]
        with explained(self.train, own, batches[0], "a training step of the range test"):
            loss = self._backward(batches)
        if trainer.args.world_size > 1:
            loss = float(trainer.accelerator.reduce(torch.tensor(loss, device=trainer.args.device), "mean"))
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = trainer.accelerator.reduce(parameter.grad, "mean")
        if math.isfinite(loss):
            self.scaler.unscale_(self.optimizer)
            if trainer.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.parameters, trainer.args.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _batch(self, numbers: Sequence[int]) -> Batch:
        """A micro-batch of the run, with the examples that are replayed."""
        trainer, source = self.trainer, self.train.source
        if trainer.replay is None:
            return self.train.batch(numbers)
        dataset, collate = trainer.with_replay(source.dataset, source.collate)
        return dict(trainer._prepare_inputs(dict(collate([dataset[number] for number in numbers]))))

    def _backward(self, batches: Sequence[Batch]) -> float:
        """The loss of an accumulated batch, whose gradient is computed."""
        trainer, total = self.trainer, 0.0
        items = trainer._get_num_items_in_batch(list(batches), trainer.args.device)
        trainer.model.train()
        for batch in batches:
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
            if items is None or not trainer.model_accepts_loss_kwargs:  # as Trainer does
                loss = loss / len(batches)
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total
