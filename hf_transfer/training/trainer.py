"""`transformers.Trainer` that executes a Plan: layer-wise learning rates and staged unfreezing.

What is overridden, and why that hook:

- `create_optimizer`: every group that will ever train exists from step 0. Trainer takes only what requires a gradient
  at that moment, so layers unfrozen later would be missing from the optimizer and never update.
- `set_initial_training_values`: the loader is known, so epochs of a stage become steps.
- `create_scheduler`: one closure per optimizer group (the stage's learning rate, the warmup after unfreezing, the run's
  schedule).
- `training_step`: the first hook with a batch; the gradient reducer of a new stage is built there (`stages`), and the
  frozen part of the batch is replayed (`boundary_cache`).
- `compute_loss_context_manager`: the first hook after `model.train()`, which Trainer calls at every micro-step and
  which would switch BatchNorm and dropout of frozen modules back on. It runs even where a subclass replaces
  `compute_loss`.
- `log`: the learning rate of every layer group, not only of the first.
- `_save`: an adapter is saved with the model's labels.

The objective is in `minimizing`, replay in `holding`, checkpoints and resuming in `saving` and `resuming`, a solved
head in `probing`, loaders in `loading`. The callback `stages.Unfreezing` begins a stage at the beginning of an
optimizer step; an evaluation may end one.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from hf_transfer.adapters import attach
from hf_transfer.adapters.files import complete
from hf_transfer.config.arguments import plan
from hf_transfer.errors import UserError, one_line
from hf_transfer.layers.groups import LayerGroup, layer_groups
from hf_transfer.models import bundled as bundled_models
from hf_transfer.plan.make import make_plan
from hf_transfer.plan.optimizer_groups import lr_factors, parameter_groups
from hf_transfer.plan.plan import Plan
from hf_transfer.plan.stage_records import StageRecord
from hf_transfer.training import (
    adalora,
    adapting,
    batchnorm,
    console,
    contrastive,
    keeping,
    linear_probe,
    schedule_checks,
)
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.backend_checks import check_backend, check_optimizer_class, shard_blocks
from hf_transfer.training.best_metric import check_early_stopping, evaluation_sets, set_direction
from hf_transfer.training.boundary_cache import BoundaryCache
from hf_transfer.training.course import Course
from hf_transfer.training.early_stopping import EarlyStopping
from hf_transfer.training.minimizing import Minimizing, PenaltyGradients
from hf_transfer.training.schedules import SCHEDULES, name_of, run_schedule
from hf_transfer.training.stages import Unfreezing


class TransferMixin(Minimizing):
    """Makes a Trainer execute a Plan; the first base of a subclass of your own Trainer:

        class MyTransferTrainer(TransferMixin, MyTrainer): ...

    On several processes `compute_loss` is called twice more on the first batch of a stage, without training.

    Attributes:
        plan: the Plan being executed, resolved to steps once training starts; None if no plan key is set.
        layer_groups: the model's layer groups, input to head; empty without a plan.
        trainable: names of the parameters that may train. Parameters that the caller froze stay frozen.
        pretrained_statistics: names of the BatchNorm layers whose running statistics came with the model.
        unfreezing: executes the plan; None without one.
        objective: the loss, the weight of a micro-batch, and `penalties`, which may be appended to before training.
        boundary: replays the frozen part, if `boundary_cache` is on.
        course: compares the evaluations of a run, if there are metrics of ours.
        num_steps: optimizer steps of the run, once the plan is resolved.
        shows_plan: whether `train` prints the plan; not with `log_level: error`.
        shown_plan: the plan that it printed.

    Raises:
        UserError: the model, the optimizer or the distributed backend cannot execute the plan.
    """

    optimizer: Any
    lr_scheduler: Any
    plan: Plan | None = None
    layer_groups: tuple[LayerGroup, ...] = ()
    unfreezing: Unfreezing | None = None
    trainable: tuple[str, ...] = ()
    pretrained_statistics: frozenset[str] = frozenset()
    course: Course | None = None
    num_steps: int = 0
    shows_plan: bool = True
    shown_plan: Plan | None = None

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        teacher = keeping.teacher_of(args, model)
        if isinstance(args, TransferArguments):
            if args.is_adapted and model is not None and not attach.is_adapted(model):
                bundled_models.name_base(model)
            model = attach.attach(model, args, args.layer_rules or ())
        super().__init__(model, args, *rest, **kwargs)
        self.boundary = BoundaryCache(self)
        if isinstance(self.args, TransferArguments):
            console.replace_default(self.callback_handler, self.args)
            set_direction(self.args, self.args.has_own_direction, evaluation_sets(self))
            has_plan = plan.is_wanted(self.args)
            self._set_objective(has_plan)
            if has_plan:
                self._set_plan()
            if adapting.wanted(self.args) or self.target_dataset is not None:
                adapting.attach(self, self.target_dataset)
            if (patience := self.args.early_stopping_patience) is not None:
                self.add_callback(EarlyStopping(patience, self.args.early_stopping_threshold))
            keeping.add_penalties(self, teacher)
        self.add_callback(PenaltyGradients(self.objective))
        self.add_callback(self.guards)

    def _set_plan(self) -> None:
        self._set_layers()
        self.plan = make_plan(self.args, self.layer_groups)
        self.pretrained_statistics = batchnorm.pretrained(self)
        check_backend(self, self.plan)
        shard_blocks(self)
        if linear_probe.wanted(self.args):
            linear_probe.check_trainer(self, has_own_loss=self.objective.loss is None)
        if contrastive.wanted(self.args):
            contrastive.check_trainer(self)
        self.unfreezing = Unfreezing(self)
        self.add_callback(self.unfreezing)
        if adalora.is_adalora(self.model):
            self.add_callback(adalora.AdaLora(self.model))

    def _set_layers(self) -> None:
        self._release_head()
        self._find_layers()
        if self._keep_below_solution():
            self._find_layers()

    def _find_layers(self) -> None:
        self.layer_groups = layer_groups(self.model, self.args.layer_rules or ())
        self.trainable = tuple(n for n, p in self.model.named_parameters() if p.requires_grad)

    @property
    def stage_records(self) -> list[StageRecord]:
        """One record per stage that has begun."""
        if self.solution is not None and self._solves:
            assert self.plan is not None
            metrics = {f"eval_{self.solution.measure}": self.solution.score}
            return [StageRecord(self.plan.stages[0].name, 0, 0, self.seconds, self.solution.loss, metrics)]
        return [] if self.unfreezing is None else self.unfreezing.records

    # ---- optimizer and schedule ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.plan is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self._require_grad()
        opt_model = self.model if model is None else model
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, opt_model)
        check_optimizer_class(cls, kwargs, self.args.optim)
        no_decay = self._no_decay(opt_model)
        groups = parameter_groups(opt_model, self.layer_groups, self.plan, self.args.weight_decay, no_decay)
        groups += self.objective.parameter_groups(len(self.plan.stages), self.args.weight_decay)
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _no_decay(self, model: nn.Module) -> set[str]:
        """Names of parameters without weight decay: biases and norms by name, and those that the model lists."""
        listed: set[str] = set()
        for path, module in model.named_modules():
            declare = getattr(module, "no_weight_decay", None)  # timm's convention
            if callable(declare):
                listed |= {f"{path}.{name}".lstrip(".") for name in declare()}
        decayed = set(self.get_decay_parameter_names(model))
        return listed | {n for n, _ in model.named_parameters() if n not in decayed or attach.VECTORS.search(n)}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        is_ours = self.plan is not None or self.args.lr_scheduler_type in SCHEDULES
        if self.lr_scheduler is not None or not is_ours:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = self.time_budget.stretched(run_schedule(self.args, num_training_steps))
        optimizer = self.optimizer if optimizer is None else optimizer
        if self.plan is None:
            assert schedule is not None, "our schedules are functions of the step"
            self.lr_scheduler = LambdaLR(optimizer, schedule)
        elif schedule is not None:
            for group in optimizer.param_groups:  # a second `train()` must not start at the rates the first ended with
                group["lr"] = next(rate for rate in group["rates"] if rate)
            factors = [lr_factors(self._current_plan, group, schedule) for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, factors)
        elif len(self.plan.stages) > 1 or self.plan.unfreeze_warmup_steps:
            raise UserError(
                f"lr_scheduler_type: {name_of(self.args)} follows a metric and cannot follow a plan of several stages.",
                "Use linear, cosine, constant or another schedule of the step.",
            )
        self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _current_plan(self) -> Plan:
        assert self.plan is not None
        return self.plan

    def check_optimization(self) -> None:
        """Create an optimizer and a scheduler and discard them, so that bad keys are reported before training.

        Raises:
            UserError: the optimizer or the scheduler does not accept its keys.
        """
        keys = "optim, optim_args"
        try:
            self.create_optimizer()
            keys = "lr_scheduler_type, lr_scheduler_kwargs"
            self.create_scheduler(1000, self.optimizer)
        except UserError:
            raise
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"{keys}: {one_line(error)}") from error
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = False

    # ---- stages ----

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, *rest: Any) -> Any:
        """Epochs become steps here: the loader is final, also after `auto_find_batch_size` replaced it."""
        values = super().set_initial_training_values(args, dataloader, *rest)
        if self.plan is not None:
            if len(self.plan.stages) > 1 and not has_length(dataloader):
                raise UserError(
                    "The training set has no length, so the epochs of a stage cannot be counted.",
                    "Use a dataset with a length, or a strategy with one stage.",
                )
            # Recreated: a hyperparameter search sets arguments between trials, and `max_steps` the length of the run.
            steps_per_epoch, max_steps = values[1], values[-1]
            self.num_steps, self.steps_per_epoch = max_steps, steps_per_epoch
            adapting.follow(self)
            num_epochs = max_steps / steps_per_epoch if args.max_steps > 0 else None
            new_plan = make_plan(self.args, self.layer_groups, num_train_epochs=num_epochs)
            self.plan = new_plan.resolve(steps_per_epoch, max_steps)
            self.time_budget.follow(self.plan, max_steps)
            check_early_stopping(self.callback_handler.callbacks, args, self.plan, steps_per_epoch, max_steps)
            if not self._solves:
                schedule_checks.check(self.args, self.plan, max_steps)
            else:  # without a training step
                stage = replace(new_plan.stages[0], start=0, epochs=0.0)
                self.plan = replace(self.plan, stages=(stage,), num_train_epochs=0.0)
            if self.is_in_train:
                console.show_plan(self, new_plan if self._solves else self.plan)
        return values

    def resolve_plan(self) -> int:
        """Resolve the plan to steps before training, from the current loader; returns the number of optimizer steps."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.shown_plan = None
        if self.plan is not None:
            self._set_layers()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.plan is not None:  # what one run froze must not stay frozen for the next
                self._require_grad()
                self._release_head()

    def _require_grad(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name in self.trainable:
            parameters[name].requires_grad_(True)

    # ---- steps ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        inputs, replayed = self.boundary.take(inputs)
        if self.unfreezing is not None:
            self.unfreezing.before_forward(inputs, num_items_in_batch)
        with self.boundary.replaying(inputs, replayed):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        if self.unfreezing is not None:
            self.unfreezing.keep_frozen()
        return super().compute_loss_context_manager()

    # ---- files and logs ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            complete(self.model, output_dir or str(self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.unfreezing is not None and self.unfreezing.stage is not None and self.is_in_train:
            logs.setdefault("stage", self.unfreezing.stage)
            rates = self.unfreezing.rates
            if "loss" in logs and rates:
                if (gain := self.boundary.gain) is not None:
                    logs["cache_gain"] = gain
                layers = {name: rate for name, rate in rates.items() if not self.objective.owns(name)}
                logs["learning_rate"] = max(layers.values())  # Trainer logs the first group's, which is often frozen
                logs |= {f"learning_rate/{name}": rate for name, rate in rates.items()}
        super().log(logs, start_time)


class TransferTrainer(TransferMixin, Trainer):
    """A `Trainer` whose arguments may carry a Plan: see `TransferMixin`."""
