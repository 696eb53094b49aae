"""`transformers.Trainer` that executes a Plan: layer-wise learning rates and staged unfreezing.

What is overridden, and why that hook:

- `create_optimizer`: every group that will ever train exists from step 0 (Trainer takes only what requires a gradient
  at that moment, so what thaws later would never move).
- `set_initial_training_values`: the loader is known, so a stage's epochs become steps.
- `create_scheduler`: one closure per optimizer group (rate of the stage, warm-up after a thaw, the run's schedule).
- `compute_loss_context_manager`: the first hook after `model.train()`, which Trainer calls at every micro-step and
  which would switch BatchNorm and dropout of frozen modules back on. It runs even where a subclass replaces
  `compute_loss`.
- `compute_loss`: the loss of an accumulated batch equals the loss of the same examples in one batch.
- `_get_num_items_in_batch`: -100 is no mark of an ignored label among a regression's values.
- `_load_optimizer_and_scheduler`: a checkpoint of another plan is refused (it is loaded by position, with its rates).
- `log`: the rate of every layer group, not only of the first.
- `_save`: an adapter's labels stand beside it.
- a callback at the beginning of each optimizer step, where a new stage may begin.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from . import adapters, strategies
from .adapter_files import write_config
from .errors import UserError, UserErrors, one_line
from .layers import LayerGroup, frozen_modules, layer_groups
from .optim import current_rates, lr_factors, parameter_groups
from .plan import Plan, Stage, make_plan
from .records import StageRecord, stage_records
from .strategies import PlanArguments


@dataclass
class TransferArguments(PlanArguments, TrainingArguments):
    """`TrainingArguments` and the keys of a Plan (`PlanArguments`).

    With no plan key set, `TransferTrainer` computes exactly what `Trainer` computes. `stages` sets
    `num_train_epochs` to the sum of its epochs.

    Raises:
        UserErrors: all problems of the plan keys at once.
    """

    def __post_init__(self) -> None:
        self.adapter = strategies.with_adapter(self.strategy, self.adapter)
        problems = strategies.check(self)
        if problems:
            raise UserErrors(problems)
        if self.stages is not None:
            self.num_train_epochs = float(sum(s["epochs"] for s in self.stages))
        # Where there is no accelerator this changes nothing for one process; several launched ones would, without it,
        # each train alone and say nothing.
        self.use_cpu |= not torch.accelerator.is_available()
        super().__post_init__()


class TransferTrainer(Trainer):
    """A `Trainer` whose arguments may carry a Plan.

    Attributes:
        plan: the Plan being executed, resolved to steps once training starts; None with no plan key set.
        layer_groups: the model's layer groups, input to head; empty without a plan.

    Raises:
        UserError: a plan that the model, the optimizer or the distributed backend cannot carry out.
    """

    optimizer: Any
    lr_scheduler: Any
    plan: Plan | None = None
    layer_groups: tuple[LayerGroup, ...] = ()

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        if isinstance(args, TransferArguments):
            model = adapters.attach(model, args, args.layer_rules or ())
        super().__init__(model, args, *rest, **kwargs)
        self._stage: int | None = None
        self._stage_began = 0.0
        self._stage_seconds: dict[int, float] = {}
        self._frozen: list[nn.Module] = []
        self._rates: dict[str, float] = {}
        self._weighs_loss = False
        if not (isinstance(self.args, TransferArguments) and strategies.is_wanted(self.args)):
            return
        self._find_layers()
        self.plan = make_plan(self.args, self.layer_groups)
        self._check_backend()
        # Trainer counts the items of an accumulated batch only for models that take the count; `compute_loss` below
        # needs it for all. A loss of the caller's own, and DataParallel, keep Trainer's behaviour.
        own_loss = type(self).compute_loss is not TransferTrainer.compute_loss or self.compute_loss_func is not None
        self._weighs_loss = not own_loss and self.args.n_gpu <= 1
        self.model_accepts_loss_kwargs |= self._weighs_loss
        self.add_callback(_StageCallback(self))
        if adapters.is_adapted(self.model) and adapters.peft_type(self.model) == "ADALORA":
            self._allocate_ranks()

    def _find_layers(self) -> None:
        """The layer groups, and what may train: the caller's own freeze stays."""
        self.layer_groups = layer_groups(self.model, self.args.layer_rules or ())
        self._trainable = [n for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def stage_records(self) -> list[StageRecord]:
        """One record per stage that has begun."""
        if self.plan is None or self.plan.stages[0].start is None:
            return []
        return stage_records(self.plan, self.state.log_history, self.state.global_step, self._stage_seconds)

    def _check_backend(self) -> None:
        assert self.plan is not None
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise UserError(
                "A plan makes its own optimizer groups, so `optimizers=` cannot be given with one.",
                "Choose the optimizer with `optim` or `optimizer_cls_and_kwargs`.",
            )
        if len(self.plan.stages) > 1:
            for enabled, name in ((self.is_deepspeed_enabled, "DeepSpeed"), (self.is_fsdp_enabled, "FSDP")):
                if enabled:
                    raise UserError(
                        f"strategy {self.plan.strategy} changes what trains, which {name} cannot do once it has begun.",
                        "Use a strategy of one stage (linear-probe, partial, full) or plain data parallelism.",
                    )

    def _allocate_ranks(self) -> None:
        assert self.plan is not None
        if len(self.plan.stages) > 1:
            raise UserError(
                f"adapter: adalora shares ranks between layers, which {self.plan.strategy} thaws in stages.",
                "Use strategy: full, or adapter: lora.",
            )
        if self.args.resume_from_checkpoint:
            raise UserError(
                "resume_from_checkpoint: adalora's budget is in no checkpoint, so its run cannot be continued.",
                "Start anew, or use adapter: lora.",
            )
        self.add_callback(adapters.AdaLora())

    # ---- optimizer and schedule ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.plan is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self._require_grad()
        opt_model = self.model if model is None else model
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, opt_model)
        if (
            not isinstance(cls, type)
            or not issubclass(cls, torch.optim.Optimizer)
            or {"params", "model", "optimizer_dict"} & set(kwargs)
        ):
            raise UserError(
                f"optim: {self.args.optim} makes its own parameter groups, so a plan cannot set its rates.",
                "Use an ordinary optimizer such as adamw_torch_fused.",
            )
        self.optimizer = cls(
            parameter_groups(
                opt_model, self.layer_groups, self.plan, self.args.weight_decay, self._no_decay(opt_model)
            ),
            **kwargs,
        )
        return self.optimizer

    def _no_decay(self, model: nn.Module) -> set[str]:
        """Names that are never decayed: biases and norms by name, and what the model itself lists."""
        listed: set[str] = set()
        for path, module in model.named_modules():
            declare = getattr(module, "no_weight_decay", None)  # timm's convention
            if callable(declare):
                listed |= {f"{path}.{name}".lstrip(".") for name in declare()}
        decayed = set(self.get_decay_parameter_names(model))
        return listed | {n for n, _ in model.named_parameters() if n not in decayed or adapters.VECTORS.search(n)}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.plan is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        # The run's own schedule, taken from a stand-in: every factor is a function of the step alone.
        stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=self.args.learning_rate)
        schedule = super().create_scheduler(num_training_steps, stand_in)
        if isinstance(schedule, LambdaLR):
            for group in self.optimizer.param_groups:  # a second `train()` begins anew, not at the rates it ended with
                group["lr"] = next(rate for rate in group["rates"] if rate)
            factors = [lr_factors(self.plan, group, schedule.lr_lambdas[0]) for group in self.optimizer.param_groups]
            self.lr_scheduler = LambdaLR(self.optimizer, factors)
        else:
            if len(self.plan.stages) > 1 or self.plan.unfreeze_warmup_steps:
                raise UserError(
                    f"lr_scheduler_type: {self.args.lr_scheduler_type} sets rates from the metric and cannot follow a "
                    "plan of several stages.",
                    "Use linear, cosine, constant or another schedule of the step.",
                )
            self.lr_scheduler = None
            super().create_scheduler(num_training_steps, self.optimizer)
        return self.lr_scheduler

    def check_optimization(self) -> None:
        """Make an optimizer and a schedule and throw them away: their keys are read before anything is trained.

        Raises:
            UserError: the optimizer or the schedule refuses its keys.
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
        """Epochs become steps here: the loader is final (also after `auto_find_batch_size` made it anew)."""
        values = super().set_initial_training_values(args, dataloader, *rest)
        if self.plan is not None:
            if len(self.plan.stages) > 1 and not has_length(dataloader):
                raise UserError(
                    "The training set has no length, so a stage's epochs cannot be counted.",
                    "Give a data set with a length, or a strategy of one stage.",
                )
            # Made anew: a hyperparameter search sets arguments between trials, and `max_steps` the length of the run.
            steps_per_epoch, max_steps = values[1], values[-1]
            length = max_steps / steps_per_epoch if args.max_steps > 0 else None
            plan = make_plan(self.args, self.layer_groups, num_train_epochs=length)
            self.plan = plan.resolve(steps_per_epoch, max_steps)
        return values

    def resolve_plan(self) -> None:
        """Fill in the plan's steps before training, from the loader as it is now."""
        if self.plan is not None:
            self.set_initial_training_values(self.args, self.get_train_dataloader())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.plan is not None:
            self._find_layers()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.plan is not None:  # what a run froze must not stay frozen for the next one
                self._require_grad()

    def _require_grad(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name in self._trainable:
            parameters[name].requires_grad_(True)

    def begin_step(self, step: int) -> None:
        """Called before optimizer step `step` (0 for the first): begin its stage if it is not the current one."""
        assert self.plan is not None
        index = self.plan.at(step)
        if index == self._stage:
            return
        self.end_stage()
        stage = self.plan.stages[index]
        self._freeze(stage)
        self._stage = index
        self._stage_began = time.perf_counter()

    def _freeze(self, stage: Stage) -> None:
        """Let exactly the parameters of `stage` train: frozen ones lose gradient and optimizer state."""
        parameters, eligible = dict(self.model.named_parameters()), set(self._trainable)
        changed = False
        for group in self.layer_groups:
            for name in group.parameters:
                parameter, active = parameters[name], name in eligible and stage.rate(group.name, name) > 0
                changed |= parameter.requires_grad != active
                parameter.requires_grad_(active)
                if not active:
                    parameter.grad = None
                    self.optimizer.state.pop(parameter, None)
        self._frozen = frozen_modules(self.model, self.layer_groups)
        if changed and isinstance(self.model_wrapped, DistributedDataParallel):
            self._rewrap(self.model_wrapped)

    def _rewrap(self, ddp: DistributedDataParallel) -> None:
        """Build the gradient reducer anew: it reduces what required a gradient when it was built, and nothing else.

        In place, so that every reference to the wrapped model stays valid.
        """
        handler = self.accelerator.ddp_handler
        kwargs = handler.to_kwargs() if handler is not None else {}
        DistributedDataParallel.__init__(
            ddp, ddp.module, device_ids=ddp.device_ids, output_device=ddp.output_device, **kwargs
        )
        if handler is not None:
            handler.register_comm_hook(ddp)

    def end_stage(self) -> None:
        """Note the stage's time, and give all processes rank 0's BatchNorm statistics."""
        if self._stage is not None:
            self._stage_seconds[self._stage] = time.perf_counter() - self._stage_began
            self.share_buffers()

    def share_buffers(self) -> None:
        """Buffers in train mode are each process's own: make them one before they are evaluated, saved or frozen."""
        if isinstance(self.model_wrapped, DistributedDataParallel):
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def reset_stages(self, step: int) -> None:
        """Begin a training run at optimizer step `step`."""
        self._stage, self._stage_seconds = None, {}
        self.begin_step(step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Refuse a checkpoint of another plan: its rates would silently replace this one's."""
        if self.plan is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        ours = _shape_of(self.optimizer)
        refusal = UserError(
            f"resume_from_checkpoint: {checkpoint!r} was made under another plan (other groups, rates or decay).",
            "Resume with the keys that it was started with, or start a new run from its weights.",
        )
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise refusal from error
        if _shape_of(self.optimizer) != ours:
            raise refusal

    # ---- steps ----

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        for module in self._frozen:
            module.training = False
        return super().compute_loss_context_manager()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss of the model, weighted by this micro-batch's share of the accumulated batch.

        Trainer divides by the number of micro-batches, or, for models that take loss keywords and ignore them (BERT),
        not at all: neither is the loss of the whole batch when the last one is short.
        """
        if num_items_in_batch is None or not self._weighs_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = _count(inputs["labels"]).ne(-100).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # The count is over all processes, and the gradients will be averaged over them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = loss * items * processes / num_items_in_batch  # in the loss's own precision, from left to right
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self._weighs_loss:
            batch_samples = [
                {**batch, "labels": _count(batch["labels"])} if "labels" in batch else batch for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    # ---- files ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if adapters.is_adapted(self.model) and self.args.should_save:
            write_config(self.model, output_dir or str(self.args.output_dir))

    # ---- evaluation ----

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._every_example():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._every_example():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _every_example(self) -> Iterator[None]:
        """With a plan, `dataloader_drop_last` is for training: a metric is over every example."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and self.plan is None
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

    # ---- logs ----

    def note_rates(self) -> None:
        """Keep the rates of the optimizer step just taken (the scheduler moves on before Trainer logs)."""
        self._rates = current_rates(self.optimizer.param_groups)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.plan is not None and self._stage is not None and self.is_in_train:
            logs["stage"] = self._stage
            if "loss" in logs and self._rates:
                logs["learning_rate"] = max(self._rates.values())  # Trainer's own is the first group's, often frozen
                logs |= {f"learning_rate/{name}": rate for name, rate in self._rates.items()}
        super().log(logs, start_time)


def _count(labels: Any) -> Any:
    """Labels to count: a value of a regression is never -100 for "ignore"."""
    return torch.zeros_like(labels) if torch.is_tensor(labels) and labels.is_floating_point() else labels


def _shape_of(optimizer: Any) -> list[Any]:
    """What of an optimizer's groups a plan decides."""
    return [(list(g["layers"]), list(g["rates"]), g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]


class _StageCallback(TrainerCallback):
    """Moves the trainer along its plan at the boundaries of optimizer steps."""

    def __init__(self, trainer: TransferTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.reset_stages(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.note_rates()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        plan = self.trainer.plan
        assert plan is not None
        last = state.global_step >= state.max_steps
        if args.logging_strategy != "no" and (last or plan.at(state.global_step) != self.trainer._stage):
            control.should_log = True  # so that no logged loss mixes two stages
        self._share_buffers(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._share_buffers(control)

    def _share_buffers(self, control: TrainerControl) -> None:
        if control.should_evaluate or control.should_save:
            self.trainer.share_buffers()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.end_stage()
