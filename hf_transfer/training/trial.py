"""A batch computed twice, as it is and as a replay, with nothing moved: whether both agree, and what each takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from hf_transfer.errors import one_line
from hf_transfer.features import replay
from hf_transfer.features.replay import Batch, Cut, Refused
from hf_transfer.training import ddp
from hf_transfer.training.running import RunningTrainer

Form = tuple[tuple[int, ...], torch.dtype]  # of one example
Tensors = dict[str, torch.Tensor]
KEPT = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# How far two ways to compute the same may lie apart, relative to the largest logit and to a gradient's norm.
_LOGITS = {torch.float64: 1e-9, torch.float32: 1e-4}
_GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUNDED = 0.1  # in fewer bits, or where less is kept than was computed


@dataclass
class Trial:
    """What was seen.

    Attributes:
        cut: that was tried; with real memory where something writes into it.
        full, top: seconds of a step as it is, and as a replay.
        error: largest difference of the logits, relative to the largest.
        recording: seconds.
        operations: floating-point, of the frozen part.
        unneeded: what of a batch what trains does not read, with the form that it may have instead.
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
    with counting() as counter, torch.no_grad(), trainer.accelerator.autocast():
        trainer.model.eval()
        trainer.model(**{name: value for name, value in batch.items() if name != "labels"})
    return int(counter.get_total_flops())


def counting() -> FlopCounterMode:
    return FlopCounterMode(display=False)


def try_cut(trainer: RunningTrainer, cut: Cut, batch: Batch, rounds: int = 1) -> Trial:
    """Record and replay a batch of its own.

    Args:
        trainer: with exactly that requiring a gradient which trains.
        cut: where the model is entered.
        batch: on the model's device.
        rounds: how often it is computed each way; the last time counts.

    Raises:
        Refused: the ways differ.
    """
    trainer.model.eval()
    with counting() as counter, trainer.accelerator.autocast():
        replay.record(trainer.model, [cut], batch)
    began = time.perf_counter()
    with trainer.accelerator.autocast():
        (rows,) = replay.record(trainer.model, [cut], batch)
    recording = time.perf_counter() - began
    _record_one_alone(trainer, cut, batch, rows)
    if (kept := KEPT.get(trainer.args.boundary_cache_dtype)) is not None:
        rows = {n: x.to(kept).to(x.dtype) if x.is_floating_point() else x for n, x in rows.items()}
    found = compare(trainer, cut, batch, rows, rounds)
    found.recording, found.operations = recording, int(counter.get_total_flops())
    found.unneeded = _unneeded(trainer, found.cut, batch, rows)
    return found


def _record_one_alone(trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors) -> None:
    """The shortest text again, without padding: a model that counts positions from the padding on gives another
    result, and is found out."""
    positions, length = replay.positions_of(batch), replay.length_of(batch)
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
    """A training step both ways; `rows` is what was recorded of the examples of the batch.

    Raises:
        Refused: logits or gradients differ.
    """
    for _ in range(rounds):
        full, logits, gradients = _step(trainer, batch)
    try:
        for _ in range(rounds):
            with _replaying(trainer, cut, batch, rows):
                top, found, found_gradients = _step(trainer, batch)
    except RuntimeError as failure:
        if cut.real:
            raise Refused(f"the replay fails ({one_line(failure, 120)})") from failure
        # Perhaps something writes into what nobody depends on.
        return compare(trainer, Cut(cut.calls, cut.reads, real=True), batch, rows, rounds)
    error = _check_logits(trainer, logits, found)
    if [g is None for g in gradients] != [g is None for g in found_gradients]:
        raise Refused("with it other parameters get a gradient")
    most = 5 * _ROUNDED if _rounds(trainer) else _GRADIENTS.get(_dtype(logits), 5 * _ROUNDED)
    if (worst := _worst(gradients, found_gradients)) > most:
        raise Refused(f"with it a gradient differs by {worst:.1e} of its norm")
    return Trial(cut, full, top, error)


def compare_answers(trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors) -> None:
    """An evaluation both ways.

    Raises:
        Refused: logits differ.
    """
    inputs, answers = {name: value for name, value in batch.items() if name != "labels"}, []
    with torch.no_grad(), trainer.accelerator.autocast():
        for way in (contextlib.nullcontext(), _replaying(trainer, cut, batch, rows)):
            with way:
                leaves = pytree.tree_leaves(trainer.model(**inputs))
            answers.append([x for x in leaves if torch.is_tensor(x) and x.is_floating_point()][:1])
    _check_logits(trainer, *answers)


@contextlib.contextmanager
def _replaying(
    trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors, length: int | None = None
) -> Iterator[None]:
    rows = {name: value.clone() for name, value in rows.items()}  # the model may write into them
    count, length = replay.count_of(batch), replay.length_of(batch) if length is None else length
    with replay.replaying(trainer.model, cut, rows, count, length, trainer.args.device):
        yield


def _step(trainer: RunningTrainer, batch: Batch) -> tuple[float, list[torch.Tensor], list[torch.Tensor | None]]:
    """(seconds, logits, gradients) of a forward and backward pass that leaves no trace."""
    model, device = trainer.model, trainer.args.device
    trains = [p for p in model.parameters() if p.requires_grad]
    with ddp.without_a_trace(model):
        began = time.perf_counter()
        model.train()
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
        gradients = torch.autograd.grad(loss, trains, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    leaves = [x for x in pytree.tree_leaves(outputs) if torch.is_tensor(x) and x.requires_grad]
    return seconds, [x.detach() for x in leaves], list(gradients)


def _unneeded(trainer: RunningTrainer, cut: Cut, batch: Batch, rows: Tensors) -> dict[str, Form]:
    """Pictures, or texts of which the class token alone is kept."""
    count, length = replay.count_of(batch), replay.length_of(batch)
    if any(not torch.is_tensor(value) or value.shape[:1] != (count,) for value in batch.values()):
        return {}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not length:
        floats = {n: v for n, v in inputs.items() if v.is_floating_point() and n not in cut.reads}
        return {name: (tuple(value.shape[1:]), value.dtype) for name, value in floats.items()}
    if any(leaf.ragged for _, _, leaf in cut.stored.values()):
        return {}
    texts = {n: v for n, v in inputs.items() if v.shape[1:] == (length,)}
    others = batch | {n: torch.ones_like(v[:, :1]) for n, v in texts.items()}
    try:
        found = []
        for some, positions in ((batch, length), (others, 1)):
            with _replaying(trainer, cut, batch, rows, positions):
                _, logits, gradients = _step(trainer, some)
            found.append([*logits, *(g for g in gradients if g is not None)])
    except (RuntimeError, ValueError, IndexError):
        return {}
    return {name: ((1,), value.dtype) for name, value in texts.items()} if replay.equal(*found) else {}


def _rounds(trainer: RunningTrainer) -> bool:
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
    if not error <= (_ROUNDED if _rounds(trainer) else _LOGITS.get(_dtype(one), _ROUNDED)):
        raise Refused(f"with it the logits differ by {error:.1e} of the largest")
    return error


def _dtype(logits: list[torch.Tensor]) -> torch.dtype:
    return min((x.dtype for x in logits), key=lambda dtype: dtype.itemsize)


def _worst(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> float:
    """The largest difference of a gradient, relative to its norm and to that of all."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    total = sum(float(a.square().sum()) for a, _ in pairs) ** 0.5
    return max((float((a - b).norm()) / max(float(a.norm()), 1e-3 * total, 1e-30) for a, b in pairs), default=0.0)
