"""Guards of a training run: signals, non-finite values, and the moment of saving.

A callback that runs after all others. Nothing here waits for the device or for other ranks within a step: what a step
shows is read in the next one.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.errors import Interrupted, WorkFailed, option
from hf_transfer.run_folder import NONFINITE
from hf_transfer.training import keeping
from hf_transfer.training.ddp import on_any_rank
from hf_transfer.training.running import RunningTrainer

ECHO = 1.0  # seconds; a launcher forwards a signal that its processes may have received themselves


class Policy(enum.StrEnum):
    """What to do when the loss or the gradient is NaN or infinite."""

    STOP = "stop"
    SKIP = "skip"
    ROLLBACK = "rollback"


class Recorder:
    """A sampler that keeps the indices it has drawn in this epoch."""

    def __init__(self, sampler: Any):
        self.sampler = sampler
        self.drawn: list[int] = []

    def __iter__(self) -> Iterator[int]:
        self.drawn = []
        for index in self.sampler:
            self.drawn.append(index)
            yield index

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)  # `set_epoch`, `generator`


def record(loader: Any) -> Recorder | None:
    """Wrap the sampler of a prepared loader in a recorder; None for a stream, which has no sampler."""
    inner: Any = getattr(loader, "batch_sampler", None)
    while hasattr(inner, "batch_sampler"):
        inner = inner.batch_sampler
    if not hasattr(inner, "sampler"):
        return None
    inner.sampler = Recorder(inner.sampler)
    return inner.sampler


class Guards(TrainerCallback):
    """Watch over a trainer.

    Attributes:
        received: number of the signal that this process received; 0 for none.
        stopping: number of the signal that all ranks know of: the next checkpoint is the last one.
        recorder: the indices of the examples; None for a stream.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.received = self.stopping = 0
        self.recorder: Recorder | None = None
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None
        self._count = 0
        self._loss: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        self._pending: tuple[torch.Tensor, Any, dict[str, Any]] | None = None  # (flag, CUDA event, step)
        self._saves_at_epoch_end = False
        self._received_at = 0.0

    # ---- signals ----

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT within the context; a second signal, after `ECHO`, ends the process at once."""
        args = self.trainer.args
        saves = getattr(args, "save_on_signal", False)
        saves = saves and args.probe_solver != "lbfgs"  # solving has no step to finish
        if not saves or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = self.stopping = 0
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _share_signal(self) -> None:
        """Tell all ranks of a signal: sent in one step and read in the next, so that no rank waits."""
        if self._group is None:
            self.stopping = self.stopping or self.received
            return
        if self._vote is not None:
            values, work = self._vote
            work.wait()
            self.stopping = self.stopping or int(values[0])
        values = torch.tensor([self.received])
        self._vote = values, dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def saved(self, folder: Path) -> None:
        """Called when a checkpoint has been saved: the moment to stop, if a signal was received.

        Raises:
            Interrupted: a signal was received.
        """
        if not self.stopping:
            return
        if self.trainer.is_world_process_zero():
            name = signal.Signals(self.stopping).name
            goes_on = f"resume with {option('resume_from_checkpoint', 'auto')}"
            if self.trainer.args.save_only_model:
                goes_on = "it holds weights only (save_only_model: true), so the run cannot be resumed"
            took = f" {time.perf_counter() - self._received_at:.1f} s after the signal" if self._received_at else ""
            sys.stderr.write(f"hf-transfer: {name}: {folder.name} was saved{took}; {goes_on}.\n")
        self._finish()
        raise Interrupted(128 + self.stopping)

    def end_early(self) -> None:
        """Called before the first step, where nothing is worth saving: a received signal ends the run at once.

        Raises:
            Interrupted: a rank has received a signal.
        """
        args, own = self.trainer.args, bool(self.received)
        if not (on_any_rank([own], args.device)[0] if args.world_size > 1 else own):
            return
        number = self.received or signal.SIGTERM
        if self.trainer.is_world_process_zero():
            name = signal.Signals(number).name
            sys.stderr.write(f"hf-transfer: {name} before the first step: there is nothing to resume, start again.\n")
        raise Interrupted(128 + number)

    # ---- non-finite values ----

    @property
    def policy(self) -> Policy | None:
        """What to do about non-finite values; None to do nothing."""
        policy = getattr(self.trainer.args, "on_nonfinite", None)
        return None if policy is None else Policy(policy)

    def note_loss(self, loss: torch.Tensor) -> None:
        """Take the loss of a micro-batch, a scalar."""
        self._loss = loss if self._loss is None else self._loss + loss

    def note_norm(self, norm: Any) -> None:
        """Take the norm of the gradient over all ranks, before clipping."""
        self._norm = norm if torch.is_tensor(norm) else None

    def _check(self) -> None:
        """Check whether this step's loss and gradient are finite: at once on a CPU, one step later on a GPU."""
        loss, self._loss = self._loss, None
        scaled = (
            getattr(self.trainer.accelerator, "scaler", None) is not None
        )  # the scaler handles overflows of the gradient
        norm = None if scaled else self._norm
        values = [value for value in (norm, loss) if value is not None]
        if not values:
            return
        is_bad = torch.stack([~torch.isfinite(value.detach().float()) for value in values]).any()
        if self.trainer.args.world_size > 1:  # each rank has a loss of its own
            flag = is_bad.float()
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            is_bad = flag > 0
        step = self._describe_step(loss, norm)
        if self._pending is not None:
            flag, event, last_step = self._pending
            self._pending = None
            event.synchronize()  # recorded a step ago
            if bool(flag):
                self._act(last_step)
                return
        if is_bad.device.type == "cuda" and self.policy is not Policy.SKIP:
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(is_bad, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = flag, event, step
        elif bool(is_bad):
            self._act(step)

    def _describe_step(self, loss: torch.Tensor | None, norm: torch.Tensor | None) -> dict[str, Any]:
        """For `nonfinite.jsonl`; `examples` is (first, end, indices drawn in this epoch)."""
        state, args = self.trainer.state, self.trainer.args
        steps = max(1, self.trainer.steps_per_epoch)
        size = args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        begin = state.global_step % steps * size
        drawn = self.recorder.drawn if self.recorder is not None else []
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": loss,
            "grad_norm": norm,
            "examples": (begin, begin + size, drawn),
        }

    def _act(self, step: dict[str, Any]) -> None:
        """Record the batch, and stop, skip or roll back.

        Raises:
            WorkFailed: the policy is stop, or there were more than `max_nonfinite` such steps.
        """
        args, state = self.trainer.args, self.trainer.state
        begin, end, drawn = step.pop("examples")
        values = {k: str(float(step.pop(k))) if step.get(k) is not None else None for k in ("loss", "grad_norm")}
        self._count += 1
        stops = self.policy is Policy.STOP or self._count > args.max_nonfinite
        entry = {**step, **values, "action": "stop" if stops else self.policy, "examples": drawn[begin:end]}
        if self.trainer.is_world_process_zero():
            with (Path(str(args.output_dir)) / NONFINITE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if stops:
            many = f", after {self._count - 1} such steps" if self.policy is not Policy.STOP else ""
            raise WorkFailed(
                f"The loss or its gradient is NaN or infinite at optimizer step {entry['step']}{many} (loss "
                f"{values['loss']}, gradient norm {values['grad_norm']}); {NONFINITE} in the output folder lists the "
                "examples.",
                f"{keeping.advice(self.trainer)}"
                "Try a lower learning_rate, a warmup or a lower max_grad_norm; check those examples; or skip such "
                f"steps with {option('on_nonfinite', 'skip')}. The last checkpoint was saved before this step.",
            )
        if self.policy is Policy.ROLLBACK:
            self.trainer.roll_back()
        own = self.trainer.objective.named_parameters().values()
        for parameter in (*self.trainer.model.parameters(), *own):
            parameter.grad = None  # optimizers skip parameters without a gradient
        if self.trainer.is_world_process_zero():
            done = "skipped" if self.policy is Policy.SKIP else "rolled back to the newest checkpoint"
            sys.stderr.write(
                f"hf-transfer: step {state.global_step}: NaN or infinite loss or gradient; {done}, see {NONFINITE}.\n"
            )

    # ---- the callback ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.continue_counting()
        self._vote = self._pending = self._loss = self._norm = None
        self._count = 0
        self._saves_at_epoch_end = False
        if args.world_size > 1 and dist.is_initialized() and getattr(args, "save_on_signal", False):
            self._group = dist.new_group(backend="gloo")
        if self.policy:
            args.logging_nan_inf_filter = False  # the filter would hide the true loss, and waits for the device

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.policy:
            self._check()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.policy and "loss" in (logs or {}):
            self.trainer._tr_loss.zero_()  # Trainer subtracts it from itself: NaN would stay

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._share_signal()
        if self.stopping:
            control.should_save = True
        # An evaluation or log at the end of the epoch comes after the step's checkpoint, so a run resumed from there
        # would miss it. The checkpoint waits for it.
        at_end = (state.epoch or 0) == int(state.epoch or 0) or state.global_step >= state.max_steps
        if control.should_save and at_end:
            control.should_save, self._saves_at_epoch_end = False, True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self._saves_at_epoch_end
        self._saves_at_epoch_end = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._pending is not None:
            flag, event, last_step = self._pending
            self._pending = None
            event.synchronize()
            if bool(flag):
                self._act(last_step)
        self._finish()
        self.trainer.stop_counting()

    def _finish(self) -> None:
        if self._vote is not None:
            self._vote[1].wait()
            self._vote = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
