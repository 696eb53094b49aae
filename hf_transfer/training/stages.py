"""Executes the stages of a Plan: what is frozen, at which learning rates, and which gradients ranks reduce.

A callback, because stages begin and end between optimizer steps and at evaluations. Hooks of the Trainer itself
(`trainer`) call in here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from hf_transfer.errors import UserError
from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.layers.side_effects import without_side_effects
from hf_transfer.plan import plateau
from hf_transfer.plan.optimizer_groups import current_rates
from hf_transfer.plan.plan import Plan, Stage
from hf_transfer.plan.stage_records import StageRecord, stage_records
from hf_transfer.training import ddp
from hf_transfer.training.best_metric import check_evaluated, evaluation_sets, watched
from hf_transfer.training.running import RunningTrainer

# The property was renamed in a later version of transformers.
_CHECKPOINTS = "is_activation_checkpointing"
if not hasattr(PreTrainedModel, _CHECKPOINTS):
    _CHECKPOINTS = "is_gradient_checkpointing"


class Unfreezing(TrainerCallback):
    """Moves a trainer along its plan.

    Attributes:
        stage: index of the current stage; None before training.
        frozen: modules in eval mode: those in which nothing trains, and BatchNorm that keeps its statistics.
        rates: {layer group: learning rate} of the last optimizer step.
        seconds_before: wall time in seconds by stage, until the current stage began or was resumed.
        is_probing: whether the current forward pass only finds out which parameters the loss reaches; it may be in eval
            mode.
        best: weights and buffers at the best evaluation of the stage, on the CPU; None unless a plateau ends the
            stage.
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
        self._evaluated = (-1, set[str]())  # (optimizer step, names of the metrics that were computed there)

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
        """Wall time in seconds by stage so far."""
        before = self.seconds_before
        if self.stage is None:
            return before
        return {**before, self.stage: before.get(self.stage, 0.0) + time.perf_counter() - self._began}

    # ---- stages ----

    def begin_step(self, step: int) -> None:
        """Called before optimizer step `step`, counted from 0: begins its stage if that is not the current one."""
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

    @property
    def kept_statistics(self) -> frozenset[str]:
        """Names of the BatchNorm layers that stay in eval mode where they train, as `batchnorm` says."""
        is_kept = self.trainer.choices["batchnorm"].value == "frozen"
        return self.trainer.pretrained_statistics if is_kept else frozenset()

    def trains(self, stage: Stage) -> set[str]:
        """Names of the parameters that train in `stage`."""
        eligible = set(self.trainer.trainable)
        return {
            name
            for group in self.trainer.layer_groups
            for name in group.parameters
            if name in eligible and stage.rate(group.name, name) > 0
        }

    @contextlib.contextmanager
    def training_as_in(self, stage: Stage, keeping: Collection[str] | None = None) -> Iterator[None]:
        """Within the context, exactly the parameters of `stage` require a gradient, and the rest is frozen.

        Args:
            stage: of the plan.
            keeping: names of layers that keep their statistics although they train; None: as `batchnorm` says.
        """
        before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        frozen, active = self.frozen, self.trains(stage)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in active)
        keeping = self.kept_statistics if keeping is None else keeping
        self.frozen = frozen_modules(self.model, self.trainer.layer_groups, keeping)
        try:
            yield
        finally:
            self.frozen = frozen
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(before[name])

    def _freeze(self, stage: Stage) -> None:
        """Make exactly the parameters of `stage` trainable; frozen ones lose their gradient and optimizer state."""
        active = self.trains(stage)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None
                self.trainer.optimizer.state.pop(parameter, None)
        self.frozen = frozen_modules(self.model, self.trainer.layer_groups, self.kept_statistics)
        self._reducer_is_stale = ddp.data_parallel(self.trainer.model_wrapped) is not None

    def _set_rates(self, step: int) -> None:
        """Set the learning rates of this optimizer step.

        Trainer's scheduler does not count a step that was skipped because of an overflow, and it has advanced before a
        plateau begins a stage.
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
        """Put frozen modules in eval mode: Trainer calls `model.train()` at every micro-step."""
        for module in self.frozen:
            module.training = False

    # ---- ranks ----

    def before_forward(self, inputs: dict[str, Any], num_items_in_batch: Any) -> None:
        """Called with each micro-batch: the first of a stage shows which gradients its reducer has to wait for."""
        if not self._reducer_is_stale:
            return
        wrapped = ddp.data_parallel(self.trainer.model_wrapped)
        assert wrapped is not None
        traverses = bool(self.trainer.args.ddp_find_unused_parameters)
        self._idle = {} if traverses else self._unreached(inputs, num_items_in_batch)
        frozen = {id(buffer) for module in self.frozen for buffer in module.buffers(recurse=False)}
        frozen_buffers = {name for name, buffer in self.model.named_buffers() if id(buffer) in frozen}
        left_out = frozen_buffers | set(self._idle)
        ddp.build_reducer(wrapped, self.trainer.accelerator.ddp_handler, left_out, traverses)
        self._reducer_is_stale = False

    def _unreached(self, inputs: dict[str, Any], num_items_in_batch: Any) -> dict[str, nn.Parameter]:
        """Trainable parameters that no rank's loss depends on, neither in train mode nor in eval mode.

        Some layers are skipped at random in train mode, others take part in eval mode only.
        """
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        trainer, reached = self.trainer, set[int]()
        inputs = trainer._prepare_inputs(inputs)
        self.is_probing = True
        for training in (False, True):
            self.model.train(training)
            with without_side_effects(self.model), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(self.model, dict(inputs), num_items_in_batch=num_items_in_batch)
            reached |= ddp.reached(loss)
        self.is_probing = False
        used = ddp.on_any_rank([id(p) in reached for p in trainable.values()], trainer.args.device)
        return {name: p for (name, p), flag in zip(trainable.items(), used, strict=True) if not flag}

    def _check_idle(self) -> None:
        """Raises:
        UserError: a parameter that was left out of the reducer got a gradient after all.
        """
        late = [name for name, parameter in self._idle.items() if parameter.grad is not None]
        if late:
            raise UserError(
                f"{late[0]} contributes to the loss in some steps only.", "Set ddp_find_unused_parameters: true."
            )

    def _share_buffers(self) -> None:
        """Synchronize buffers, which ranks update separately, before they are evaluated, saved or frozen."""
        if self.trainer.args.parallel_mode == ParallelMode.DISTRIBUTED:
            ddp.share_buffers(self.model)

    # ---- plateaus ----

    def _progress(self, stage: int) -> plateau.Progress:
        return plateau.progress(self.trainer.state.log_history, stage, *watched(self.trainer.args))

    def _note_evaluation(self, metrics: dict[str, float]) -> None:
        """Keep the best weights of a stage that ends at a plateau, and begin the next stage once it has been reached.

        Raises:
            UserError: the evaluation has no metric of that name.
        """
        patience = self.plan.stages[self.stage].patience if self.stage is not None else None
        if self.stage is None or patience is None:
            return
        step = self.trainer.state.global_step
        before = self._evaluated[1] if self._evaluated[0] == step else set()  # several sets are evaluated one by one
        self._evaluated = step, before | set(metrics)
        check_evaluated(self._evaluated[1], self.trainer.args, evaluation_sets(self.trainer))
        if watched(self.trainer.args)[0] not in metrics:
            return
        # Rank 0 decides: a custom metric may differ in its last bit between ranks.
        (progress,) = broadcast_object_list([self._progress(self.stage)])
        if self.trainer.args.unfreeze_restore_best and progress.best_step == step:
            trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            tensors = trainable | dict(self.model.named_buffers())
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        if progress.since_best >= patience:
            self.trainer.plan = self.plan.begin(self.stage + 1, step)

    def _restore_best(self) -> None:
        """Restore the best weights of the stage that a plateau ended; the optimizer keeps its moments."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            for name, value in (self.best or {}).items():
                tensors[name].copy_(value)
        self.trainer.ema.follow(self.best or ())

    # ---- the callback ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stage, self._idle, self.seconds_before = None, {}, {}
        if self.plan.waits:
            self.trainer.plan = plateau.begun(self.plan, state.log_history, *watched(self.trainer.args))
        for module in self.model.modules():
            # For reentrant activation checkpointing, which is refused here, transformers makes the output of the
            # embeddings require a gradient; frozen layers above would be recomputed and back-propagated needlessly.
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
        # Kept here, since the scheduler advances before Trainer logs.
        self.rates = current_rates(self.trainer.optimizer.param_groups)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if args.logging_strategy != "no" and (last or self.plan.at(state.global_step) != self.stage):
            control.should_log = True  # so that no logged loss spans two stages
        elif self.plan.waits and control.should_evaluate:
            control.should_log = True  # a plateau may end the stage here
        self._share_buffers_if_read(control)

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
        self._share_buffers_if_read(control)

    def _share_buffers_if_read(self, control: TrainerControl) -> None:
        if control.should_evaluate or control.should_save:
            self._share_buffers()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end_stage()
        self.trainer.boundary.finish()
