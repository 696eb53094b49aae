"""Carries out the stages of a Plan while a Trainer trains: what is frozen, at which rates, reduced over which ranks.

A callback, because stages begin and end at the boundaries of optimizer steps and at evaluations. What needs a hook of
the Trainer itself (`trainer`) calls in here.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from hf_transfer.errors import UserError, nearest
from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.plan import plateau
from hf_transfer.plan.optimizer_groups import current_rates
from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.plan.stage_records import StageRecord, stage_records
from hf_transfer.training import ddp
from hf_transfer.training.running import RunningTrainer

# The newer name of the property, where transformers has it.
_CHECKPOINTS = "is_activation_checkpointing"
if not hasattr(PreTrainedModel, _CHECKPOINTS):
    _CHECKPOINTS = "is_gradient_checkpointing"


class Unfreezing(TrainerCallback):
    """Moves a trainer along its plan.

    Attributes:
        stage: index of the stage that trains; None before training.
        frozen: the modules in which nothing trains.
        rates: {layer group: rate} of the optimizer step last taken.
        seconds_before: wall time by stage, without what the current stage has taken since it began, or was resumed.
        is_probing: whether a forward pass is made to see what the loss reaches; it may be in eval mode.
        best: weights and buffers of the stage's best evaluation, on the CPU, where a plateau will end the stage.
    """

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer
        self.stage: int | None = None
        self.frozen: list[nn.Module] = []
        self.rates: dict[str, float] = {}
        self.is_probing = False
        self.best: dict[str, torch.Tensor] | None = None
        self._began = 0.0
        self.seconds_before: dict[int, float] = {}
        self._reducer_is_stale = False
        self._idle: dict[str, nn.Parameter] = {}

    @property
    def plan(self) -> Plan:
        assert self.trainer.plan is not None
        return self.trainer.plan

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def records(self) -> list[StageRecord]:
        """One record per stage that has begun."""
        if self.plan.stages[0].start is None:
            return []
        state, restores = self.trainer.state, self.trainer.args.unfreeze_restore_best
        best = {}
        for i, (stage, following) in enumerate(zip(self.plan.stages, self.plan.stages[1:], strict=False)):
            step = self._progress(i).best_step if restores and stage.patience is not None else None
            if step is not None and following.start is not None:
                best[i] = step
        return stage_records(self.plan, state.log_history, state.global_step, self.seconds_before, best)

    @property
    def seconds(self) -> dict[int, float]:
        """Wall time by stage so far."""
        before = self.seconds_before
        if self.stage is None:
            return before
        return {**before, self.stage: before.get(self.stage, 0.0) + time.perf_counter() - self._began}

    # ---- stages ----

    def begin_step(self, step: int) -> None:
        """Called before optimizer step `step` (0 for the first): begin its stage if it is not the current one."""
        index, scheduler = self.plan.at(step), self.trainer.lr_scheduler
        if index != self.stage:
            self._begin_stage(index, step)
        elif not isinstance(scheduler, LambdaLR) or scheduler.last_epoch == step:
            return
        self._set_rates(step)

    def _begin_stage(self, index: int, step: int) -> None:
        self._end_stage()
        stage = self.plan.stages[index]
        if stage.start == step:
            self._restore_best()
            self.best = None
        self._freeze(stage)
        self.stage, self._began = index, time.perf_counter()
        self.trainer.boundary.begin(index)

    def trains(self, stage: Stage) -> set[str]:
        """Names of the parameters that train in `stage`."""
        eligible = set(self.trainer.trainable)
        return {
            name
            for group in self.trainer.layer_groups
            for name in group.parameters
            if name in eligible and stage.rate(group.name, name) > 0
        }

    def _freeze(self, stage: Stage) -> None:
        """Let exactly the parameters of `stage` train: frozen ones lose gradient and optimizer state."""
        active = self.trains(stage)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None
                self.trainer.optimizer.state.pop(parameter, None)
        self.frozen = frozen_modules(self.model, self.trainer.layer_groups)
        self._reducer_is_stale = ddp.data_parallel(self.trainer.model_wrapped) is not None

    def _set_rates(self, step: int) -> None:
        """One clock: the rates are those of this optimizer step.

        Trainer's scheduler does not count a step that was skipped for an overflow, and it has moved on before a plateau
        begins a stage.
        """
        scheduler = self.trainer.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            scheduler.last_epoch = step
            rates = [base * f(step) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(self.trainer.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _end_stage(self) -> None:
        if self.stage is not None:
            self.seconds_before, self._began = self.seconds, time.perf_counter()
            self._share_buffers()

    def keep_frozen(self) -> None:
        """Frozen modules to eval: `model.train()`, which Trainer calls at every micro-step, reaches them too."""
        for module in self.frozen:
            module.training = False

    # ---- ranks ----

    def before_forward(self, inputs: dict[str, Any], num_items_in_batch: Any) -> None:
        """Called with each micro-batch: the first of a stage shows what its gradient reducer must wait for."""
        if not self._reducer_is_stale:
            return
        wrapped = ddp.data_parallel(self.trainer.model_wrapped)
        assert wrapped is not None
        walks = bool(self.trainer.args.ddp_find_unused_parameters)
        self._idle = {} if walks else self._unreached(inputs, num_items_in_batch)
        frozen = {id(buffer) for module in self.frozen for buffer in module.buffers(recurse=False)}
        still = {name for name, buffer in self.model.named_buffers() if id(buffer) in frozen}
        ddp.build_reducer(wrapped, self.trainer.accelerator.ddp_handler, still | set(self._idle), walks)
        self._reducer_is_stale = False

    def _unreached(self, inputs: dict[str, Any], num_items_in_batch: Any) -> dict[str, nn.Parameter]:
        """What trains in this stage, but no rank's loss depends on: neither in train mode nor in eval mode, since
        some layers are skipped at random in the one, and others take part in the other only."""
        trains = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        trainer, found = self.trainer, set[int]()
        inputs = trainer._prepare_inputs(inputs)
        self.is_probing = True
        for training in (False, True):
            self.model.train(training)
            with ddp.without_a_trace(self.model), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(self.model, dict(inputs), num_items_in_batch=num_items_in_batch)
            found |= ddp.reached(loss)
        self.is_probing = False
        used = ddp.on_any_rank([id(p) in found for p in trains.values()], trainer.args.device)
        return {name: p for (name, p), flag in zip(trains.items(), used, strict=True) if not flag}

    def _check_idle(self) -> None:
        """Raises:
        UserError: a parameter that was left out of the reducer got a gradient after all.
        """
        late = [name for name, parameter in self._idle.items() if parameter.grad is not None]
        if late:
            raise UserError(
                f"{late[0]} takes part in the loss of some steps only.", "Set ddp_find_unused_parameters: true."
            )

    def _share_buffers(self) -> None:
        """Buffers in train mode are each process's own: make them one before they are evaluated, saved or frozen."""
        if self.trainer.args.parallel_mode == ParallelMode.DISTRIBUTED:
            ddp.share_buffers(self.model)

    # ---- plateaus ----

    @property
    def _watched(self) -> tuple[str, bool]:
        """(the metric's name in the logs, whether more of it is better)"""
        args = self.trainer.args
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        return f"eval_{name}", bool(args.metric_for_best_model and args.greater_is_better)

    def _progress(self, stage: int) -> plateau.Progress:
        return plateau.progress(self.trainer.state.log_history, stage, *self._watched)

    def _note_evaluation(self, metrics: dict[str, float]) -> None:
        """Keep the best weights of a stage that waits for a plateau, and let the next begin when it has come.

        Raises:
            UserError: the evaluation has no such metric.
        """
        patience = self.plan.stages[self.stage].patience if self.stage is not None else None
        if self.stage is None or patience is None:
            return
        name = self._watched[0].removeprefix("eval_")
        known = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_")]
        if name not in known and not isinstance(self.trainer.eval_dataset, dict):
            raise UserError(
                f"metric_for_best_model: the evaluation has no {name!r}, it has {', '.join(known)}."
                f"{nearest(name, known)}"
            )
        step = self.trainer.state.global_step
        # Rank 0's view counts: a metric of the caller's own may differ in its last bit between ranks.
        (seen,) = broadcast_object_list([self._progress(self.stage)])
        if self.trainer.args.unfreeze_restore_best and seen.best_step == step:
            trains = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            tensors = trains | dict(self.model.named_buffers())
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        if seen.since_best >= patience:
            self.trainer.plan = self.plan.begin(self.stage + 1, step)

    def _restore_best(self) -> None:
        """Back to the best weights of the stage that a plateau ended; the optimizer keeps its averages."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            for name, value in (self.best or {}).items():
                tensors[name].copy_(value)

    # ---- the callback ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stage, self._idle, self.seconds_before = None, {}, {}
        if self.plan.waits:
            self.trainer.plan = plateau.begun(self.plan, state.log_history, *self._watched)
        for module in self.model.modules():
            # transformers makes the embeddings' output require a gradient for the reentrant form of checkpointing,
            # which is refused here; frozen layers above it would be run again and back-propagated through for nothing.
            if isinstance(module, PreTrainedModel) and getattr(module, _CHECKPOINTS):
                module.disable_input_require_grads()
        self.begin_step(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.begin_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._check_idle()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Kept here: the scheduler moves on before Trainer logs.
        self.rates = current_rates(self.trainer.optimizer.param_groups)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if args.logging_strategy != "no" and (last or self.plan.at(state.global_step) != self.stage):
            control.should_log = True  # so that no logged loss mixes two stages
        elif self.plan.waits and control.should_evaluate:
            control.should_log = True  # a plateau may end the stage here
        self._make_buffers_one(control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.trainer.is_in_train:
            self._note_evaluation(metrics or {})

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.plan.waits and control.should_evaluate:
            control.should_log = True
        self._make_buffers_one(control)

    def _make_buffers_one(self, control: TrainerControl) -> None:
        if control.should_evaluate or control.should_save:
            self._share_buffers()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end_stage()
        self.trainer.boundary.finish()
