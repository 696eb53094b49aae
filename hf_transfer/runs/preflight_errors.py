"""Preflight: what a failed attempt means, and which key to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_transfer.adapters.attach import is_adapted
from hf_transfer.adapters.configuration import peft_type
from hf_transfer.errors import UserError, one_line
from hf_transfer.features.batches import Batch, count_of, length_of
from hf_transfer.models.heads import MLPHead
from hf_transfer.runs.preflight_examples import Examples
from hf_transfer.runs.preflight_stages import BatchSizes, Step
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training import keeping
from hf_transfer.training.trainer import TransferTrainer

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, MemoryError)
_ITS_OWN = "The error is the model's own: use another one, or report it to its authors."
ONE_VALUE = "Expected more than 1 value per channel"  # torch's BatchNorm


@contextlib.contextmanager
def explained(split: Examples, numbers: list[int], batch: Batch, what: str) -> Iterator[None]:
    """Context in which a library's error becomes a `UserError` that names the key to change.

    Args:
        split: the examples.
        numbers: those that are tried.
        batch: of them.
        what: is tried with them, for example "an evaluation batch".
    """
    try:
        yield
    except UserError:
        raise
    except FAILURES as error:
        raise _explain(error, split, numbers, batch, what) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the machine's memory was not enough."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _explain(error: Exception, split: Examples, numbers: list[int], batch: Batch, what: str) -> UserError:
    name = type(error).__name__
    problem = f"{what} fails ({split.describe(numbers[0])}; {name}: {one_line(error, 200).rstrip('.')})."
    if is_out_of_memory(error):
        return _out_of_memory(split, batch, what)
    on_gpu = "CUDA error" in str(error)  # nothing can be computed any more
    if not on_gpu and _adapter_is_at_fault(split.trainer.model, batch):
        kind = peft_type(split.trainer.model)
        return UserError(
            f"with an adapter of type {kind}, {problem} Without the adapter the model answers.",
            "Use lora or another adapter, or other options for this one.",
            key="adapter",
        )
    if split.lengths is None:
        return _of_images(split, batch, problem)
    longest, shortest = split.extremes[0], split.extremes[-1]
    if not on_gpu and numbers == [shortest] and _answers(split.trainer.model, split.batch([longest, shortest])):
        return UserError(f"{problem} Padded to the length of other texts it does not fail.", "Remove this text.")
    if not on_gpu and longest in numbers and split.lengths[longest] > split.lengths[shortest]:
        limit = _readable_length(split, longest, shortest)
        if limit:
            return UserError(
                f"{problem} The model reads the first {limit} tokens of this text, but not all of them.",
                f"Set max_seq_length: {limit}.",
                key="max_seq_length",
            )
    return UserError(problem, _ITS_OWN, key="model_name_or_path")


def _out_of_memory(split: Examples, batch: Batch, what: str) -> UserError:
    trains = split.name == "train"
    key = "per_device_train_batch_size" if trains else "per_device_eval_batch_size"
    length = length_of(batch)
    size = f"{count_of(batch)} examples" + (f", padded to {length} tokens" if length else "")
    smaller = " with a larger gradient_accumulation_steps to make up for it" if trains else ""
    shorter = "max_seq_length" if length else "image_size"
    return UserError(
        f"out of memory: {what} does not fit ({size}).", f"Lower it{smaller}, or lower {shorter}.", key=key
    )


def _adapter_is_at_fault(model: Any, batch: Batch) -> bool:
    """Whether the forward pass fails with the adapter only."""
    if not is_adapted(model) or _answers(model, batch):
        return False
    try:
        with model.disable_adapter():
            return _answers(model, batch)
    except FAILURES:
        return False


def _answers(model: Any, batch: Batch) -> bool:
    model.eval()
    try:
        with torch.no_grad():
            model(**{name: value for name, value in batch.items() if name != "labels"})
    except FAILURES:
        return False
    return True


def _of_images(split: Examples, batch: Batch, problem: str) -> UserError:
    size, keys = _side(batch), split.prepared.config.data
    own = getattr(split.trainer.model.config, "image_size", None)
    if keys.image_size is not None:
        return UserError(
            f"with images of {keys.image_size} pixels, {problem}",
            "Remove image_size, or use a model that takes images of this size.",
            key="image_size",
        )
    if isinstance(own, int) and size is not None and own != size:
        return UserError(
            f"the processor makes images of {size} pixels, the model expects {own}, and {problem}",
            f"Set image_size: {own}.",
            key="image_size",
        )
    return UserError(problem, _ITS_OWN, key="model_name_or_path")


def _side(batch: Batch) -> int | None:
    pixels = batch.get("pixel_values")
    return int(pixels.shape[-1]) if torch.is_tensor(pixels) else None


def _readable_length(split: Examples, longest: int, shortest: int) -> int:
    """The number of tokens of the longest text that the model can read; 0 if length is not the problem."""
    model = split.trainer.model
    assert split.lengths is not None
    batch, full = split.batch([longest]), int(split.lengths[longest])
    if _answers(model, batch) or not _answers(model, split.batch([shortest])):
        return 0
    reads, fails = 0, full
    while fails - reads > 1:
        middle = (reads + fails) // 2
        cut = {n: v[:, :middle] if torch.is_tensor(v) and v.shape[1:2] == (full,) else v for n, v in batch.items()}
        reads, fails = (middle, fails) if _answers(model, cut) else (reads, middle)
    return reads


# ---- what a training step showed -----------------------------------------------------------------------------------


def one_value(trainer: TransferTrainer, step: Step, sizes: BatchSizes, examples: int) -> UserError:
    """The error for a batch of one example, of which a BatchNorm layer gets a single value per channel."""
    args, key = trainer.args, "per_device_train_batch_size"
    why = f"BatchNorm, which trains{step.where}, cannot normalize a single value per channel."
    alone = args.world_size == 1 and args.n_gpu <= 1
    others = [size for size in range(2, examples + 1) if examples % size != 1] if alone else []
    other = min(others, key=lambda size: (abs(size - sizes.full), -size), default=None)
    instead = f"{key}: {other}" if other is not None else f"a larger {key}"
    norms_of_head = {head.norm for head in trainer.model.modules() if isinstance(head, MLPHead)}
    instead += ", or head_norm: none" if step.batch_norms <= norms_of_head else ""
    if sizes.full == 1:
        return UserError(f"a batch has one example, and {why}", f"Set {instead}.", key=key)
    drop = "dataloader_drop_last: true, or " if examples >= sizes.full * args.world_size else ""
    return UserError(
        f"with {sizes.full} examples per batch, the last batch of the {examples} training examples has one, and {why}",
        f"Set {drop}{instead}.",
        key=key,
    )


def no_gradient(prepared: Prepared, step: Step) -> UserError:
    """The error for a stage in which the loss depends on nothing that trains."""
    args = prepared.config.training
    keys = {"stages": args.stages, "freeze": args.freeze, "adapter": args.is_adapted, "strategy": args.strategy}
    key = next((name for name, value in keys.items() if value), "model_name_or_path")
    some = ", ".join(sorted(step.parameters)[:3]) or "nothing trains"
    return UserError(
        f"no gradient reaches what trains{step.where} ({some}): the loss does not depend on it.",
        "Train layers that the logits are computed with.",
        key=key,
    )


def not_finite(split: Examples, numbers: list[int], is_loss: bool) -> UserError:
    """The error for a NaN or infinite loss or gradient before the first step."""
    trainer, args = split.trainer, split.prepared.config.training
    bad = [name for name, p in trainer.model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        return UserError(
            f"the weights hold NaN or infinite values before training ({', '.join(bad[:3])}).",
            "Use another checkpoint.",
            key="model_name_or_path",
        )
    of = " or ".join(split.describe(number) for number in numbers[:2])
    problem = f"the {'loss' if is_loss else 'gradient'} is NaN or infinite before the first step ({of})."
    if args.fp16:
        return UserError(problem, "Set bf16: true instead, or neither.", key="fp16")
    return UserError(problem, f"{keeping.advice(trainer)}Check these examples and their labels.", key="on_nonfinite")
