"""What watches over a training run: signals, values that are no numbers, and the moment at which it saves.

A callback that comes after all others. Nothing here waits for the device or for other ranks in a step: what a step
shows is read in the next one.
"""

from __future__ import annotations

import contextlib
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

from hf_transfer.errors import Interrupted, WorkFailed
from hf_transfer.run_folder import NONFINITE
from hf_transfer.training.running import RunningTrainer

ECHO = 1.0  # seconds; a launcher sends on what its processes may have got themselves


class Recorder:
    """A sampler, with the indices that it has drawn in this epoch."""

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
    """Put a recorder round the sampler of a prepared loader; None for a stream, which has none."""
    inner: Any = getattr(loader, "batch_sampler", None)
    while hasattr(inner, "batch_sampler"):
        inner = inner.batch_sampler
    if not hasattr(inner, "sampler"):
        return None
    inner.sampler = Recorder(inner.sampler)
    return inner.sampler


class Guards(TrainerCallback):
    """Watches over a trainer.

    Attributes:
        received: the signal that has come.
        stopping: the signal that all ranks know of: the next checkpoint is the last.
        recorder: the indices of the examples; None where the data set is a stream.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.received = self.stopping = 0
        self.recorder: Recorder | None = None
        self._group: Any = None
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._count = 0
        self._loss: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        self._late: tuple[torch.Tensor, Any, dict[str, Any]] | None = None
        self._saves_at_epoch_end = False
        self._came = 0.0

    # ---- signals ----

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT while training; one more, after `ECHO`, ends the process at once."""
        args = self.trainer.args
        saves = getattr(args, "save_on_signal", False)
        saves = saves and args.probe_solver != "lbfgs"  # that is done in one go: there is no step to finish
        if not saves or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = self.stopping = 0
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        if not self.received:
            self.received, self._came = number, now
        elif now - self._came > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _agree(self) -> None:
        """Let every rank know what one has seen: sent with one step, read with the next, so that nobody waits."""
        if self._group is None:
            self.stopping = self.stopping or self.received
            return
        if self._sent is not None:
            values, work = self._sent
            work.wait()
            self.stopping = self.stopping or int(values[0])
        values = torch.tensor([self.received])
        self._sent = values, dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def saved(self, folder: Path) -> None:
        """Called when a checkpoint is there: the place to stop, where a signal has come.

        Raises:
            Interrupted: a signal has come.
        """
        if not self.stopping:
            return
        if self.trainer.is_world_process_zero():
            name = signal.Signals(self.stopping).name
            took = f"{time.perf_counter() - self._came:.1f} s after it came; " if self._came else ""
            sys.stderr.write(
                f"hf-transfer: {name}: {folder.name} was saved, {took}continue with --resume_from_checkpoint auto.\n"
            )
        self._finish()
        raise Interrupted(128 + self.stopping)

    # ---- values that are no numbers ----

    @property
    def policy(self) -> str | None:
        return getattr(self.trainer.args, "on_nonfinite", None)

    def note_loss(self, loss: torch.Tensor) -> None:
        """The loss of a micro-batch."""
        self._loss = loss if self._loss is None else self._loss + loss

    def note_norm(self, norm: Any) -> None:
        """The norm of the gradient over all ranks, before clipping."""
        self._norm = norm if torch.is_tensor(norm) else None

    def _look(self) -> None:
        """See whether this step's loss and gradient are numbers: at once on a CPU, else a step later."""
        loss, self._loss = self._loss, None
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None  # an overflow is its daily business
        norm = None if scaled else self._norm
        seen = [value for value in (norm, loss) if value is not None]
        if not seen:
            return
        bad = torch.stack([~torch.isfinite(value.detach().float()) for value in seen]).any()
        if self.trainer.args.world_size > 1:  # each rank has a loss of its own
            flag = bad.float()
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            bad = flag > 0
        facts = self._facts(loss, norm)
        if self._late is not None:
            flag, event, then = self._late
            self._late = None
            event.synchronize()  # recorded a step ago
            if bool(flag):
                self._act(then)
                return
        if bad.device.type == "cuda" and self.policy != "skip":
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(bad, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._late = flag, event, facts
        elif bool(bad):
            self._act(facts)

    def _facts(self, loss: torch.Tensor | None, norm: torch.Tensor | None) -> dict[str, Any]:
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

    def _act(self, facts: dict[str, Any]) -> None:
        """Note the batch, and stop, skip or roll back.

        Raises:
            WorkFailed: policy stop, or too many.
        """
        args, state = self.trainer.args, self.trainer.state
        begin, end, drawn = facts.pop("examples")
        values = {k: str(float(facts.pop(k))) if facts.get(k) is not None else None for k in ("loss", "grad_norm")}
        self._count += 1
        stops = self.policy == "stop" or self._count > args.max_nonfinite
        entry = {**facts, **values, "action": "stop" if stops else self.policy, "examples": drawn[begin:end]}
        if self.trainer.is_world_process_zero():
            with (Path(str(args.output_dir)) / NONFINITE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if stops:
            many = f", after {self._count - 1} that were passed by" if self.policy != "stop" else ""
            raise WorkFailed(
                f"The loss or its gradient is not a number at optimizer step {entry['step']}{many} (loss "
                f"{values['loss']}, gradient norm {values['grad_norm']}); {NONFINITE} in the output folder names the "
                "examples.",
                "Try a lower learning_rate, a warm-up or max_grad_norm; look at those examples; or let such steps pass "
                "with --on_nonfinite skip. The last checkpoint is from before.",
            )
        if self.policy == "rollback":
            self.trainer.roll_back()
        for parameter in self.trainer.model.parameters():
            parameter.grad = None  # an optimizer passes by what has no gradient
        if self.trainer.is_world_process_zero():
            done = "skipped" if self.policy == "skip" else "taken back to the newest checkpoint"
            sys.stderr.write(f"hf-transfer: step {state.global_step}: not a number; {done}, see {NONFINITE}.\n")

    # ---- the callback ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.continue_counting()
        self._sent = self._late = self._loss = self._norm = None
        self._count = 0
        self._saves_at_epoch_end = False
        if args.world_size > 1 and dist.is_initialized() and getattr(args, "save_on_signal", False):
            self._group = dist.new_group(backend="gloo")
        if self.policy:
            args.logging_nan_inf_filter = False  # the logged loss is the true one; and the filter waits for the device

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.policy:
            self._look()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.policy and "loss" in (logs or {}):
            self.trainer._tr_loss.zero_()  # Trainer takes it from itself, which leaves no number where there was none

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._agree()
        if self.stopping:
            control.should_save = True
        # What is due at the epoch's end (an evaluation, a log) comes after the step's checkpoint: a run resumed from it
        # would miss that. So the checkpoint waits for it.
        at_end = (state.epoch or 0) == int(state.epoch or 0) or state.global_step >= state.max_steps
        if control.should_save and at_end:
            control.should_save, self._saves_at_epoch_end = False, True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self._saves_at_epoch_end
        self._saves_at_epoch_end = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._late is not None:
            flag, event, facts = self._late
            self._late = None
            event.synchronize()
            if bool(flag):
                self._act(facts)
        self._finish()
        self.trainer.stop_counting()

    def _finish(self) -> None:
        if self._sent is not None:
            self._sent[1].wait()
            self._sent = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
