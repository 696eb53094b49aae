"""A batch computed with and without a replay: do both agree, and how long does each take?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.errors import one_line
from hf_transfer.features import replay
from hf_transfer.features.batches import Batch, count_of, equal, length_of, positions_of
from hf_transfer.features.cut import Cut, Refused
from hf_transfer.layers.side_effects import without_side_effects
from hf_transfer.training.cache_stage import Form
from hf_transfer.training.running import RunningTrainer

Tensors = dict[str, torch.Tensor]
ROUNDED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Tolerances between the two ways, relative to the largest logit and to a gradient's norm.
_LOGITS = {torch.float64: 1e-9, torch.float32: 1e-4}
_GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUNDED = 0.1  # in a smaller dtype, or where the stored values are rounded


@dataclass
class Trial:
    """What a batch showed that was computed both ways.

    Attributes:
        cut: that was tried; with `allocates` if the model writes into outputs in place.
        full: seconds of a training step without a replay.
        top: seconds of a training step with one.
        error: largest difference of the logits, relative to the largest logit.
        recording: seconds of recording.
        operations: floating-point operations of the frozen part.
        unneeded: inputs that the trainable part does not read, and the form that they may have instead.
    """

    cut: Cut
    full: float
    top: float
    error: float
    recording: float = 0.0
    operations: int = 0
    unneeded: dict[str, Form] | None = None


def operations(trainer: RunningTrainer, batch: Batch) -> int:
    """Floating-point operations of a forward pass."""
    with _counting() as counter, torch.no_grad(), trainer.accelerator.autocast():
        trainer.model.eval()
        trainer.model(**{name: value for name, value in batch.items() if name != "labels"})
    return int(counter.get_total_flops())


def _counting() -> FlopCounterMode:
    return FlopCounterMode(display=False)


def try_cut(trainer: RunningTrainer, cut: Cut, batch: Batch, rounds: int = 1) -> Trial:
    """Record a batch, and compute it both ways.

    Args:
        trainer: exactly what trains requires a gradient.
        cut: where the model is entered.
        batch: on the model's device.
        rounds: how often each way is computed; the last time is measured.

    Raises:
        Refused: the results differ.
    """
    trainer.model.eval()
    with _counting() as counter, trainer.accelerator.autocast():
        replay.record(trainer.model, [cut], batch)
    began = time.perf_counter()
    with trainer.accelerator.autocast():
        (rows,) = replay.record(trainer.model, [cut], batch)
    seconds = time.perf_counter() - began
    _record_shortest_alone(trainer, cut, batch, rows)
    if (rounded := ROUNDED_DTYPES.get(trainer.args.boundary_cache_dtype)) is not None:
        rows = {n: x.to(rounded).to(x.dtype) if x.is_floating_point() else x for n, x in rows.items()}
    result = compare(trainer, cut, batch, rows, rounds)
    result.recording, result.operations = seconds, int(counter.get_total_flops())
    result.unneeded = _unneeded(trainer, result.cut, batch, rows)
    return result


def _record_shortest_alone(trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors) -> None:
    """Record the shortest text again, without padding.

    A model whose outputs depend on the padding then fails the comparison: BERT, say, padded on the left, where it
    counts positions from the padding on.
    """
    positions, length = positions_of(batch), length_of(batch)
    if positions is None or bool(positions.all()):
        return
    i = int(positions.sum(1).argmin())
    one = {name: value[i : i + 1] for name, value in batch.items() if torch.is_tensor(value)}
    one = {n: v[:, positions[i]] if v.shape[1:2] == (length,) else v for n, v in one.items()}
    with trainer.accelerator.autocast():
        (alone,) = replay.record(trainer.model, [cut], one)
    for name, (_, _, leaf) in cut.stored.items():
        if leaf.ragged:
            rows[name][i][positions[i]] = alone[name][0]
        else:
            rows[name][i] = alone[name][0]


def compare(trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors, rounds: int = 1) -> Trial:
    """Compute a training step both ways; `rows` is what was recorded of the examples of the batch.

    Raises:
        Refused: logits or gradients differ.
    """
    for _ in range(rounds):
        full, logits, gradients = _step(trainer, batch)
    try:
        for _ in range(rounds):
            with _replaying(trainer, cut, batch, rows):
                top, replayed_logits, replayed_gradients = _step(trainer, batch)
    except RuntimeError as error:
        if cut.allocates:
            raise Refused(f"the replay fails ({one_line(error, 120)})") from error
        # The model may write into an output that nothing trainable depends on.
        return compare(trainer, Cut(cut.calls, cut.reads, allocates=True), batch, rows, rounds)
    error_of_logits = _check_logits(trainer, logits, replayed_logits)
    if [g is None for g in gradients] != [g is None for g in replayed_gradients]:
        raise Refused("with the cache other parameters get a gradient")
    most = 5 * _ROUNDED if _is_rounded(trainer) else _GRADIENTS.get(_smallest_dtype(logits), 5 * _ROUNDED)
    if (worst := _worst_difference(gradients, replayed_gradients)) > most:
        raise Refused(f"with the cache a gradient differs by {worst:.1e} of its norm")
    return Trial(cut, full, top, error_of_logits)


def compare_outputs(trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors) -> None:
    """Compute an evaluation both ways.

    Raises:
        Refused: the logits differ.
    """
    inputs, logits = {name: value for name, value in batch.items() if name != "labels"}, []
    with torch.no_grad(), trainer.accelerator.autocast():
        for way in (contextlib.nullcontext(), _replaying(trainer, cut, batch, rows)):
            with way:
                leaves = pytree.tree_leaves(trainer.model(**inputs))
            logits.append([x for x in leaves if torch.is_tensor(x) and x.is_floating_point()][:1])
    _check_logits(trainer, *logits)


@contextlib.contextmanager
def _replaying(
    trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors, length: int | None = None
) -> Iterator[None]:
    rows = {name: value.clone() for name, value in rows.items()}  # the model may write into them
    count, length = count_of(batch), length_of(batch) if length is None else length
    with replay.replaying(trainer.model, cut, rows, count, length, trainer.args.device):
        yield


def training_pass(trainer: RunningTrainer, batch: Batch) -> tuple[torch.Tensor, Any, list[torch.Tensor | None]]:
    """(loss, outputs, gradients) of a training step without the step of the optimizer; buffers change.

    Args:
        trainer: what trains requires a gradient.
        batch: on the model's device.

    Returns:
        A gradient per parameter that requires one: None if the loss does not depend on it.
    """
    model = trainer.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    if not parameters or not loss.requires_grad:
        return loss, outputs, [None] * len(parameters)
    return loss, outputs, list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _step(trainer: RunningTrainer, batch: Batch) -> tuple[float, list[torch.Tensor], list[torch.Tensor | None]]:
    """(seconds, logits, gradients) of a forward and backward pass without side effects."""
    device = trainer.args.device
    with without_side_effects(trainer.model):
        began = time.perf_counter()
        _, outputs, gradients = training_pass(trainer, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    leaves = [x for x in pytree.tree_leaves(outputs) if torch.is_tensor(x) and x.requires_grad]
    return seconds, [x.detach() for x in leaves], gradients


def seconds_of_step(trainer: RunningTrainer, batch: Batch) -> float:
    """Seconds of a forward and backward pass of what trains, without side effects."""
    return _step(trainer, batch)[0]


def seconds_of_outputs(trainer: RunningTrainer, batch: Batch) -> float:
    """Seconds of a forward pass as in an evaluation."""
    device = trainer.args.device
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    trainer.model.eval()
    began = time.perf_counter()
    with torch.no_grad(), trainer.accelerator.autocast():
        trainer.model(**inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _unneeded(trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors) -> dict[str, Form]:
    """Inputs that a replay does not read: images, or texts of which only the class token is recorded."""
    count, length = count_of(batch), length_of(batch)
    if any(not torch.is_tensor(value) or value.shape[:1] != (count,) for value in batch.values()):
        return {}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not length:
        floats = {n: v for n, v in inputs.items() if v.is_floating_point() and n not in cut.reads}
        return {name: (tuple(value.shape[1:]), value.dtype) for name, value in floats.items()}
    if any(leaf.ragged for _, _, leaf in cut.stored.values()):
        return {}
    texts = {n: v for n, v in inputs.items() if v.shape[1:] == (length,)}
    blank = batch | {n: torch.ones_like(v[:, :1]) for n, v in texts.items()}
    try:
        results = []
        for inputs_read, positions in ((batch, length), (blank, 1)):
            with _replaying(trainer, cut, batch, rows, positions):
                _, logits, gradients = _step(trainer, inputs_read)
            results.append([*logits, *(g for g in gradients if g is not None)])
    except (RuntimeError, ValueError, IndexError):
        return {}
    return {name: ((1,), value.dtype) for name, value in texts.items()} if equal(*results) else {}


def _is_rounded(trainer: RunningTrainer) -> bool:
    return bool(trainer.args.boundary_cache_dtype != "auto")


def _check_logits(trainer: RunningTrainer, one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value.

    Raises:
        Refused: it is too large.
    """
    error = 0.0
    for a, b in zip(one, other, strict=True):
        scale = max(float(a.abs().max()), torch.finfo(a.dtype).tiny)
        error = max(error, float((a.double() - b.double()).abs().max()) / scale)
    if not error <= (_ROUNDED if _is_rounded(trainer) else _LOGITS.get(_smallest_dtype(one), _ROUNDED)):
        raise Refused(f"with the cache the logits differ by {error:.1e} of the largest")
    return error


def _smallest_dtype(logits: list[torch.Tensor]) -> torch.dtype:
    return min((x.dtype for x in logits), key=lambda dtype: dtype.itemsize)


def _worst_difference(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> float:
    """The largest difference of a gradient, relative to its norm or, if larger, 0.001 times the norm of all."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    total = sum(float(a.square().sum()) for a, _ in pairs) ** 0.5
    return max((float((a - b).norm()) / max(float(a.norm()), 1e-3 * total, 1e-30) for a, b in pairs), default=0.0)
