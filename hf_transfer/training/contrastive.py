"""A contrastive stage before the head is found: SetFit's idea (Tunstall et al. 2022) with the loss of a whole batch.

The vectors that the head reads are drawn together within a class and apart between classes, by the supervised
contrastive loss of `objectives.contrastive`. Everything that the plan trains is trained, at the rates of
the plan's last stage that trains it, with AdamW, a warm-up over a tenth of the steps and a linear decay. The head is
then solved for, or trained, on the new features.

The stage belongs to the beginning of `train()`, before its step 0, and is a function of the weights, the examples and
the seed: a run that is killed within it begins again, and a resumed run finds its result in the checkpoint. All
processes compute all of it. A batch has `BATCH` examples whatever the micro-batch is: larger ones than fit are computed
in parts, whose gradients add up to that of the whole (Gao et al. 2021, section 3.2), so that memory grows with the
micro-batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from tqdm import tqdm

from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.data.labels import IGNORED
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.features.batches import Batch
from hf_transfer.features.convex_head import REGRESSION, SINGLE
from hf_transfer.features.examples import Source
from hf_transfer.features.layer_inputs import Watch
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.frozen import frozen_modules, running_statistics
from hf_transfer.layers.side_effects import untouched
from hf_transfer.objectives.contrastive import TEMPERATURE, batches_per_epoch, paired_batches, supervised_contrastive
from hf_transfer.objectives.losses import labels_of
from hf_transfer.plan.optimizer_groups import parameter_groups
from hf_transfer.training.console import is_silent
from hf_transfer.training.head import head_layers
from hf_transfer.training.probe_features import head_vectors
from hf_transfer.training.running import RunningTrainer

BATCH = 32  # examples that are compared with each other
WARMUP = 0.1  # of the steps
KEY = "contrastive_epochs"
Vectors = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Contrast:
    """What a contrastive stage did.

    Attributes:
        epochs: as the key.
        steps: optimizer steps.
        batch: examples that were compared with each other.
        temperature: of the loss.
        first_loss: mean loss of the first epoch.
        last_loss: mean loss of the last epoch.
        seconds: of the stage.
    """

    epochs: float
    steps: int
    batch: int
    temperature: float
    first_loss: float
    last_loss: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def to_log(self) -> dict[str, Any]:
        """Its numbers, for the log."""
        return {f"contrastive_{name}": value for name, value in asdict(self).items()}


def wanted(args: Any) -> bool:
    """Whether there is such a stage; plain `TrainingArguments` lack the key."""
    return isinstance(args, ProbeArguments) and args.contrastive_epochs > 0


def note(args: Any, examples: int | None = None) -> str:
    """A line for a printed plan; empty without such a stage.

    Args:
        args: of the run.
        examples: number of training examples, if it is known.
    """
    if not wanted(args):
        return ""
    steps = "" if examples is None else f", {steps_of(args.contrastive_epochs, examples)} steps of {BATCH} examples"
    return (
        f"Before stage 1, examples of one class are drawn together (contrastive_epochs: {args.contrastive_epochs:g}"
        f"{steps}), at the learning rates of the last stage."
    )


def steps_of(epochs: float, examples: int) -> int:
    """The number of optimizer steps; at least one."""
    return max(1, round(epochs * batches_per_epoch(examples, BATCH)))


def check_trainer(trainer: RunningTrainer) -> None:
    """Check that the trainer's model and plan have such a stage.

    Raises:
        UserError: they cannot, with the reason.
    """
    config = getattr(trainer.model, "config", None)
    if getattr(config, "problem_type", None) == REGRESSION or getattr(config, "num_labels", 2) == 1:
        raise UserError(
            "a regression has no classes whose examples could be drawn together.", f"Leave {KEY} out.", key=KEY
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "the stage needs the whole model in each process, and FSDP and DeepSpeed shard it.",
            "Use plain DDP.",
            key=KEY,
        )
    if trainer.args.auto_find_batch_size:
        raise UserError(
            "auto_find_batch_size would begin again with weights that the stage has changed.",
            "Leave one of them out.",
            key=KEY,
        )
    assert trainer.plan is not None
    if all(group == HEAD for stage in trainer.plan.stages for group in stage.trainable):
        raise UserError("the plan trains nothing below the head.", "Use another strategy.", key=KEY)
    layers = head_layers(trainer)
    if layers.last is None:
        raise UserError(
            f"the head does not end with one linear layer, whose input could be compared; it is {layers.shown}.",
            f"Leave {KEY} out.",
            key=KEY,
        )


# ---- the stage -------------------------------------------------------------------------------------------------------


def run(trainer: RunningTrainer) -> Contrast:
    """Train the model of a trainer, in place and the same on all processes; nothing else of it changes.

    Raises:
        UserError: the labels are no classes.
        WorkFailed: the loss is NaN or infinite.
        Interrupted: a signal was received; nothing is saved.
    """
    began, args = time.perf_counter(), trainer.args
    labels = _labels(trainer)
    examples = (labels != IGNORED).nonzero()[:, 0] if labels.ndim == 1 else torch.arange(len(labels))
    labels = labels[examples]
    steps = steps_of(args.contrastive_epochs, len(labels))
    rng, source = np.random.default_rng(args.seed), Source.of(trainer, "contrast", trainer.train_dataset)
    losses: list[float] = []
    with _training(trainer) as optimizer:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, steps))
        vectors, parameters = _vectors_of(trainer), [p for group in optimizer.param_groups for p in group["params"]]
        for batch in tqdm(_batches(labels, steps, rng), **_bar(trainer), total=steps):
            inputs = [_inputs(trainer, source, part) for part in examples[batch].split(args.train_batch_size)]
            losses.append(backward(inputs, labels[batch], vectors, int(rng.integers(2**31))))
            if not math.isfinite(losses[-1]):
                raise WorkFailed(
                    f"The contrastive loss is NaN or infinite in step {len(losses)}.", "Try a lower learning_rate."
                )
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            trainer.guards.end_early()
    _share(trainer)
    epoch = batches_per_epoch(len(labels), BATCH)
    first, last = (float(np.mean(part)) for part in (losses[:epoch], losses[-epoch:]))
    seconds = time.perf_counter() - began
    return Contrast(args.contrastive_epochs, steps, BATCH, TEMPERATURE, first, last, seconds)


def backward(parts: list[Batch], labels: torch.Tensor, vectors: Vectors, seed: int) -> float:
    """Add the gradient of the loss of a batch; returns the loss.

    With several parts, their vectors are computed without gradient first; the gradient of the loss at each vector is
    then carried back part by part, with the same random numbers (Gao et al. 2021, section 3.2).

    Args:
        parts: of the batch, as the model takes them.
        labels: of all its examples.
        vectors: (examples, width) of a part.
        seed: of dropout.
    """
    if len(parts) == 1:
        torch.manual_seed(seed)
        loss = supervised_contrastive(vectors(parts[0]), labels)
        loss.backward()
        return float(loss.detach())
    computed = []
    with torch.no_grad():
        for i, part in enumerate(parts):
            torch.manual_seed(seed + i)
            computed.append(vectors(part).float())
    whole = torch.cat(computed).requires_grad_(True)
    loss = supervised_contrastive(whole, labels)
    loss.backward()
    assert whole.grad is not None
    for i, (part, slope) in enumerate(zip(parts, whole.grad.split([len(one) for one in computed]), strict=True)):
        torch.manual_seed(seed + i)
        vectors(part).float().backward(slope)
    return float(loss.detach())


@contextlib.contextmanager
def _training(trainer: RunningTrainer) -> Iterator[torch.optim.Optimizer]:
    """Within the context, what the plan trains has a gradient and is in train mode; an optimizer for it.

    Running statistics stay: batches of pairs are no sample of the data.
    """
    args, model, plan = trainer.args, trainer.model, trainer.plan
    assert plan is not None
    groups = parameter_groups(model, trainer.layer_groups, plan, args.weight_decay, trainer._no_decay(model))
    for group in groups:
        group["lr"] = next(rate for rate in reversed(group.pop("rates")) if rate)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    idle = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    with untouched(model):
        model.train()
        for parameter in idle:
            parameter.requires_grad_(False)
        frozen = frozen_modules(model, trainer.layer_groups, running_statistics(model))
        for module in frozen:
            module.training = False
        try:
            yield optimizer
        finally:
            optimizer.zero_grad()
            for parameter in idle:
                parameter.requires_grad_(True)


def _vectors_of(trainer: RunningTrainer) -> Vectors:
    """The function from inputs to what the head reads, (examples, width).

    That is the input of its first linear layer that reads one vector per example: behind a standardization or a tanh of
    the head, distances are no longer those of the pretrained model.
    """
    model, layers = trainer.model, head_layers(trainer)
    assert layers.last is not None
    last = Watch(layers.last)
    modules = [model.get_submodule(path) for path in layers.paths]
    linear = [Watch(module) for module in modules if isinstance(module, nn.Linear)]
    # float16 would need the scaler of the training loop
    precision = contextlib.nullcontext if trainer.args.fp16 else trainer.accelerator.autocast

    def vectors(inputs: Batch) -> torch.Tensor:
        with contextlib.ExitStack() as watched, precision():
            for watch in (last, *linear):
                watched.enter_context(watch)
            output = model(**inputs)
        first = next((watch.input for watch in linear if watch.input.ndim == 2), None)
        return head_vectors(last, inputs, output) if first is None else first

    return vectors


def _batches(labels: torch.Tensor, steps: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """The batches of all steps."""
    left = steps
    while left:
        for batch in paired_batches(labels, BATCH, rng)[:left]:
            yield batch
            left -= 1


def _inputs(trainer: RunningTrainer, source: Source, numbers: torch.Tensor) -> Batch:
    """Some examples as the model takes them, without their labels."""
    inputs = dict(trainer._prepare_inputs(source.collate([source.dataset[i] for i in numbers.tolist()])))
    inputs.pop("labels", None)
    return inputs


def _labels(trainer: RunningTrainer) -> torch.Tensor:
    """(examples,) classes or (examples, labels) of 0 and 1 of the training set.

    Raises:
        UserError: they are neither.
    """
    labels = torch.as_tensor(np.asarray(labels_of(trainer.train_dataset, KEY)))
    kind = getattr(getattr(trainer.model, "config", None), "problem_type", None)
    is_binary = bool(((labels == 0) | (labels == 1)).all())
    if labels.ndim == 2 and (kind == SINGLE or not is_binary):
        raise UserError("hard labels are needed, and these are soft (probabilities).", f"Leave {KEY} out.", key=KEY)
    if labels.ndim == 1 and labels.is_floating_point():
        raise UserError("classes are needed, and the labels are numbers.", f"Leave {KEY} out.", key=KEY)
    return labels


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: up over a tenth of the steps, then down to 0."""
    rising = max(1, round(WARMUP * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def _share(trainer: RunningTrainer) -> None:
    """All processes continue from the weights of the first: sums of floats on several devices may differ."""
    if trainer.args.world_size > 1:
        for parameter in trainer.model.parameters():
            dist.broadcast(parameter.data, src=0)


def _bar(trainer: RunningTrainer) -> dict[str, Any]:
    """Keys of the progress bar of a stage that takes more than a few seconds."""
    hides = trainer.args.disable_tqdm or is_silent(trainer.args) or not trainer.is_world_process_zero()
    return {"desc": "contrastive stage", "unit": "step", "delay": 3.0, "disable": hides or None, "leave": False}
