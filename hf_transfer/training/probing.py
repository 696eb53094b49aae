"""A Trainer whose head may be solved for instead of trained, or initialized with the solution (`linear_probe`).

A contrastive stage may come before (`contrastive`).

What is overridden, and why that hook:

- `_inner_training_loop`: replaced if the head is solved for.
- `_prepare_for_training`: the contrastive stage and the head's initialization come before the model is wrapped.
- `_run_epoch`: both are logged first, once callbacks have begun.
- `_counters`: checkpoints say what came of them.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput, speed_metrics

from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.errors import UserError, option
from hf_transfer.training import contrastive, linear_probe, run_identity
from hf_transfer.training.contrastive import Contrast
from hf_transfer.training.probe_selection import Examples, Solution
from hf_transfer.training.resuming import Resumable


class Probing(Resumable):
    """A head that is solved for; see `TransferMixin`.

    Attributes:
        contrast: the contrastive stage, if there was one.
        solution: of the head, if `probe_solver` or `head_init` asked for one.
        solves_again: whether it will be solved for again on more examples; set before training (`refit`).
        solved_on: then, the features and labels of the first solution, until that is done.
        below_solution: names of the head's parameters before its last layer, if that is solved for.
    """

    control: Any
    contrast: Contrast | None = None
    solution: Solution | None = None
    solves_again: bool = False
    solved_on: Examples | None = None
    below_solution: tuple[str, ...] = ()

    @property
    def _solves(self) -> bool:
        """Whether the head is solved for, and nothing is trained."""
        return isinstance(self.args, ProbeArguments) and self.args.probe_solver == "lbfgs"

    def _keep_below_solution(self) -> bool:
        """Find what precedes the layer that is solved for; whether it was frozen, since nothing trains it.

        Raises:
            UserError: the head has no such layer.
        """
        self.below_solution = linear_probe.kept_below(self) if linear_probe.wanted(self.args) else ()
        if not self._solves or not self.below_solution:
            return False
        for name in self.below_solution:
            self.model.get_parameter(name).requires_grad_(False)
        return True

    def _release_head(self) -> None:
        """Let train what `_keep_below_solution` froze."""
        for name in self.below_solution if self._solves else ():
            self.model.get_parameter(name).requires_grad_(True)

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
                "resume_from_checkpoint: probe_solver: lbfgs solves for the head at once; there is nothing to resume.",
                f"Start over with {option('overwrite_output_dir', True)}.",
            )
        began, self.solution = time.time(), None
        self._init_training_state(0, 1, 0, None, trial)
        self.resolve_plan()
        self.create_optimizer()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.solution = linear_probe.solve(self)
        self.state.epoch = 1.0  # every example was seen once
        self._total_loss_scalar = self.solution.loss  # Trainer logs its mean per step
        self.log(self.solution.to_log())
        metrics = speed_metrics("train", began, num_samples=len(self.train_dataset))
        metrics["train_loss"] = self.solution.loss
        self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(0, self.solution.loss, metrics)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """What precedes the first step, unless the run is resumed: then its checkpoint holds it, and what is known."""
        self.contrast = self.solution = None
        if resume_from_checkpoint is not None:
            state = run_identity.read(resume_from_checkpoint) or {}
            self.contrast = Contrast(**state["contrast"]) if state.get("contrast") else None
            self.solution = Solution(**state["solution"]) if state.get("solution") else None
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if contrastive.wanted(self.args):
            before = linear_probe.solve(self) if linear_probe.wanted(self.args) else None
            self.contrast = contrastive.run(self)
            self.solution = None if before is None else linear_probe.solve(self, before)
        elif linear_probe.wanted(self.args):
            self.solution = linear_probe.solve(self)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _counters(self) -> dict[str, Any]:
        before = {"contrast": self.contrast, "solution": self.solution}
        return {**super()._counters(), **{name: None if one is None else asdict(one) for name, one in before.items()}}

    def continue_counting(self) -> None:
        super().continue_counting()
        if self.resumed_at == 0:
            self._seconds_before += 0.0 if self.contrast is None else self.contrast.seconds
            self._seconds_before += 0.0 if self.solution is None else self.solution.whole_seconds

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 0:  # the first log: callbacks have begun
            for one in (self.contrast, self.solution):
                if one is not None:
                    self.log(one.to_log())
        return super()._run_epoch(*args, **kwargs)
