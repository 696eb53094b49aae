"""A Trainer whose head may be solved for instead of trained, or begin as the solution (`linear_probe`).

What is overridden, and why that hook:

- `_inner_training_loop`: there is none where the head is solved for.
- `_prepare_for_training`: the head's beginning, where it is a solution, before the model is wrapped.
- `_run_epoch`: the solution is the first thing that is logged; callbacks have begun there.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput, speed_metrics

from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.errors import UserError
from hf_transfer.training import linear_probe
from hf_transfer.training.resuming import Resumable


class Probing(Resumable):
    """See `TransferMixin`.

    Attributes:
        solution: of the head, where `probe_solver` or `head_init` asked for one and it was found.
    """

    control: Any
    solution: linear_probe.Solution | None = None

    @property
    def _solves(self) -> bool:
        """Whether that is all there is to train."""
        return isinstance(self.args, ProbeArguments) and self.args.probe_solver == "lbfgs"

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        if not self._solves:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        if resume_from_checkpoint is not None:
            raise UserError(
                "resume_from_checkpoint: probe_solver: lbfgs finds its head in one go and goes on from nothing.",
                "Start over with --overwrite_output_dir.",
            )
        began, self.solution = time.time(), None
        self._init_training_state(0, 1, 0, None, trial)
        self.resolve_plan()
        self.create_optimizer()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.solution = linear_probe.solve(self)
        self.state.epoch = 1.0  # every example was seen once
        self._total_loss_scalar = self.solution.loss  # of which the mean is taken
        self.log(self.solution.to_log())
        metrics = speed_metrics("train", began, num_samples=len(self.train_dataset))
        metrics["train_loss"] = self.solution.loss
        self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(0, self.solution.loss, metrics)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The head's beginning, but for a resumed run: its checkpoint holds the head."""
        self.solution = None
        if linear_probe.wanted(self.args) and resume_from_checkpoint is None:
            self.solution = linear_probe.solve(self)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def continue_counting(self) -> None:
        super().continue_counting()
        if self.solution is not None:
            self._seconds_before += self.solution.seconds + self.solution.feature_seconds

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.solution is not None and self.state.global_step == 0:  # the first log: callbacks have begun
            self.log(self.solution.to_log())
        return super()._run_epoch(*args, **kwargs)
