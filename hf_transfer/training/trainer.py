"""`transformers.Trainer` that executes a Plan: layer-wise learning rates and staged unfreezing.

What is overridden, and why that hook:

- `create_optimizer`: every group that will ever train exists from step 0 (Trainer takes only what requires a gradient
  at that moment, so what thaws later would never move).
- `set_initial_training_values`: the loader is known, so a stage's epochs become steps.
- `create_scheduler`: one closure per optimizer group (rate of the stage, warm-up after a thaw, the run's schedule).
- `training_step`: the first hook with a batch; a new stage's gradient reducer is built there (`ranks`).
- `compute_loss_context_manager`: the first hook after `model.train()`, which Trainer calls at every micro-step and
  which would switch BatchNorm and dropout of frozen modules back on. It runs even where a subclass replaces
  `compute_loss`.
- `compute_loss`: the loss of an accumulated batch equals the loss of the same examples in one batch.
- `_get_num_items_in_batch`: -100 is no mark of an ignored label among a regression's values.
- what concerns checkpoints is in `resumable`.
- `training_step`, `prediction_step`, `_get_dataloader`: batches say which examples they hold, so that what the frozen
  part computes of them can be replayed (`boundary`).
- `_get_train_sampler`: balanced classes, or batches of one length.
- `floating_point_ops`: of a batch of which nothing was read there is nothing to count.
- `log`: the rate of every layer group, not only of the first.
- what concerns a head that is solved for is in `probing`.
- `_save`: an adapter's labels stand beside it.
- a callback (`unfreezing`) at the beginning of each optimizer step, where a new stage may begin, and at each
  evaluation, which may end one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from hf_transfer.adapters import attach
from hf_transfer.adapters.files import write_config
from hf_transfer.config.arguments import plan
from hf_transfer.data.bucketing import LengthSampler, lengths_of
from hf_transfer.errors import UserError, one_line
from hf_transfer.features.examples import SKIPPED, TRAINING, VALIDATION
from hf_transfer.layers.groups import LayerGroup, layer_groups
from hf_transfer.models import bundled as bundled_models
from hf_transfer.objectives import losses
from hf_transfer.objectives.losses import Loss
from hf_transfer.plan.make import make_plan
from hf_transfer.plan.optimizer_groups import lr_factors, parameter_groups
from hf_transfer.plan.plan import Plan
from hf_transfer.plan.stage_records import StageRecord
from hf_transfer.training import adalora, linear_probe
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.boundary_cache import BoundaryCache
from hf_transfer.training.probing import Probing
from hf_transfer.training.schedules import SCHEDULES, run_schedule
from hf_transfer.training.stages import Unfreezing


class TransferMixin(Probing):
    """What makes a Trainer execute a Plan; first among the bases of a subclass of your own Trainer:

        class MyTransferTrainer(TransferMixin, MyTrainer): ...

    On several processes `compute_loss` is called twice more, without training, on a stage's first batch.

    Attributes:
        plan: the Plan being executed, resolved to steps once training starts; None with no plan key set.
        layer_groups: the model's layer groups, input to head; empty without a plan.
        trainable: names of the parameters that may train: the caller's own freeze stays.
        unfreezing: carries the plan out; None without one.

    Raises:
        UserError: a plan that the model, the optimizer or the distributed backend cannot carry out.
    """

    optimizer: Any
    lr_scheduler: Any
    data_collator: Any
    plan: Plan | None = None
    layer_groups: tuple[LayerGroup, ...] = ()
    unfreezing: Unfreezing | None = None
    trainable: tuple[str, ...] = ()

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        if isinstance(args, TransferArguments):
            if args.is_adapted and model is not None and not attach.is_adapted(model):
                bundled_models.name_base(model)
            model = attach.attach(model, args, args.layer_rules or ())
        super().__init__(model, args, *rest, **kwargs)
        self._weighs_loss = False
        self._loss: Loss | None = None
        self.boundary = BoundaryCache(self)
        self._lengths: tuple[Any, torch.Tensor] | None = None
        if isinstance(self.args, TransferArguments):
            wants_plan = plan.is_wanted(self.args)
            self._choose_loss(wants_plan)
            if wants_plan:
                self._find_layers()
                self.plan = make_plan(self.args, self.layer_groups)
                self._check_backend()
                if linear_probe.wanted(self.args):
                    linear_probe.check_trainer(self, has_own_loss=self._loss is None)
                self.unfreezing = Unfreezing(self)
                self.add_callback(self.unfreezing)
                if attach.is_adapted(self.model) and attach.peft_type(self.model) == "ADALORA":
                    self._allocate_ranks()
        self.add_callback(self.guards)

    def _choose_loss(self, wants_plan: bool) -> None:
        """A loss of the caller's own, and DataParallel, keep Trainer's behaviour."""
        own = [cls for cls in type(self).__mro__ if "compute_loss" in vars(cls)] != [TransferMixin, Trainer]
        if own or self.compute_loss_func is not None:
            if self.args.class_weights not in (None, "none") or self.args.focal_gamma:
                raise UserError(
                    "class_weights and focal_gamma belong to a loss of ours, and this trainer has a loss of its own.",
                    "Leave them out, or leave `compute_loss` as it is.",
                )
            return
        loss = losses.make_loss(self.args, getattr(self.model, "config", None), self.train_dataset)
        if not (wants_plan or loss.always):  # nothing asked: Trainer's own, to the bit
            return
        self._loss = loss
        if loss.always:  # which smooths by itself; evaluations measure the model's own loss
            self.label_smoother = None
        # Trainer counts the items of an accumulated batch only for models that take the count; `compute_loss` below
        # needs it for all.
        self._weighs_loss = self.args.n_gpu <= 1
        self.model_accepts_loss_kwargs |= self._weighs_loss

    def _find_layers(self) -> None:
        """The layer groups, and what may train: the caller's own freeze stays."""
        self.layer_groups = layer_groups(self.model, self.args.layer_rules or ())
        self.trainable = tuple(n for n, p in self.model.named_parameters() if p.requires_grad)

    @property
    def stage_records(self) -> list[StageRecord]:
        """One record per stage that has begun."""
        if self.solution is not None and self._solves:
            assert self.plan is not None
            found = {f"eval_{self.solution.measure}": self.solution.score}
            return [StageRecord(self.plan.stages[0].name, 0, 0, self.seconds, self.solution.loss, found)]
        return [] if self.unfreezing is None else self.unfreezing.records

    def _check_backend(self) -> None:
        assert self.plan is not None
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise UserError(
                "A plan makes its own optimizer groups, so `optimizers=` cannot be given with one.",
                "Choose the optimizer with `optim` or `optimizer_cls_and_kwargs`.",
            )
        if len(self.plan.stages) > 1:
            fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            for enabled, name in ((self.is_deepspeed_enabled, "DeepSpeed"), (fsdp1, "FSDP 1")):
                if enabled:
                    raise UserError(
                        f"strategy {self.plan.strategy} changes what trains, which {name} cannot do once it has begun.",
                        "Use a strategy of one stage (linear-probe, partial, full), FSDP 2 (fsdp_version: 2) or plain "
                        "data parallelism.",
                    )
        if self.plan.waits and self.args.eval_strategy == "no":
            raise UserError(
                "unfreeze_trigger: plateau watches evaluations, and there are none.", "Set eval_strategy: epoch."
            )
        if self.plan.waits and self.args.unfreeze_restore_best and self.is_fsdp_enabled:
            raise UserError(
                "unfreeze_restore_best keeps a copy of the weights, which FSDP has in parts.",
                "Set unfreeze_restore_best: false.",
            )
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (vars(self.args).get(name) or {}).get("use_reentrant"):
                raise UserError(
                    f"{name}: use_reentrant: true gives trainable layers above frozen ones no gradient.",
                    "Leave it out: the other form is the default.",
                )

    def _allocate_ranks(self) -> None:
        assert self.plan is not None
        if len(self.plan.stages) > 1:
            raise UserError(
                f"adapter: adalora shares ranks between layers, which {self.plan.strategy} thaws in stages.",
                "Use strategy: full, or adapter: lora.",
            )
        self.add_callback(adalora.AdaLora())

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
        return listed | {n for n, _ in model.named_parameters() if n not in decayed or attach.VECTORS.search(n)}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        ours = self.plan is not None or self.args.lr_scheduler_type in SCHEDULES
        if self.lr_scheduler is not None or not ours:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = run_schedule(self.args, num_training_steps)
        optimizer = self.optimizer if optimizer is None else optimizer
        if self.plan is None:
            assert schedule is not None, "ours are functions of the step"
            self.lr_scheduler = LambdaLR(optimizer, schedule)
        elif schedule is not None:
            for group in optimizer.param_groups:  # a second `train()` begins anew, not at the rates it ended with
                group["lr"] = next(rate for rate in group["rates"] if rate)
            factors = [lr_factors(self._current_plan, group, schedule) for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, factors)
        elif len(self.plan.stages) > 1 or self.plan.unfreeze_warmup_steps:
            raise UserError(
                f"lr_scheduler_type: {self.args.lr_scheduler_type} sets rates from the metric and cannot follow a "
                "plan of several stages.",
                "Use linear, cosine, constant or another schedule of the step.",
            )
        self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _current_plan(self) -> Plan:
        assert self.plan is not None
        return self.plan

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
            if self._solves:  # without a step
                self.plan = replace(
                    self.plan, stages=(replace(plan.stages[0], start=0, epochs=0.0),), num_train_epochs=0.0
                )
        return values

    def resolve_plan(self) -> int:
        """Fill in the plan's steps before training, from the loader as it is now; the number of optimizer steps."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

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
        if self._loss is not None and self._loss.applies(inputs.get("labels")):
            if self.model.training or (self.unfreezing is not None and self.unfreezing.is_probing):
                return self._compute_own_loss(self._loss, model, inputs, return_outputs, num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs)  # an evaluation: the model's own mean
        if num_items_in_batch is None or not self._weighs_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = _count(inputs["labels"]).ne(-100).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # The count is over all processes, and the gradients will be averaged over them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = loss * items * processes / num_items_in_batch  # in the loss's own precision, from left to right
        return (loss, outputs) if return_outputs else loss

    def _compute_own_loss(
        self, loss: Loss, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any
    ) -> Any:
        """As `compute_loss`, with weights for items: each micro-batch's share of the accumulated batch's weight."""
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        total = loss.total(outputs["logits"] if isinstance(outputs, dict) else outputs[0], inputs["labels"])
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        weight = loss.weight(inputs["labels"]) if num_items is None else num_items / processes
        value = total / torch.as_tensor(weight).to(total).clamp(min=torch.finfo(total.dtype).tiny)
        return (value, outputs) if return_outputs else value

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self._weighs_loss and self._loss is not None and batch_samples:
            labels = [batch.get("labels") for batch in batch_samples]
            if all(self._loss.applies(one) for one in labels):
                weight = torch.stack([self._loss.weight(one) for one in labels]).sum().to(device)
                shared = self.args.average_tokens_across_devices and self.args.world_size > 1
                return self.accelerator.gather(weight).sum() if shared else weight
        if self._weighs_loss:
            batch_samples = [
                {**batch, "labels": _count(batch["labels"])} if "labels" in batch else batch for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    # ---- files ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if attach.is_adapted(self.model) and self.args.should_save:
            write_config(self.model, output_dir or str(self.args.output_dir))

    # ---- examples ----

    def get_train_dataloader(self) -> Any:
        if isinstance(self.args, TransferArguments) and self.args.length_bucketing:
            self.length_sampler()  # Trainer asks for no sampler of a stream, and would leave it in its own order
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if isinstance(self.args, TransferArguments) and self.args.balanced_sampling:
            labels = losses.labels_of(self.train_dataset, "balanced_sampling")
            if labels and not isinstance(labels[0], int):
                raise UserError(
                    "balanced_sampling: the labels are not one class each.", "Use class_weights: auto instead."
                )
            return losses.BalancedSampler(labels, self._order_seed)
        if isinstance(self.args, TransferArguments) and self.args.length_bucketing:
            return self.length_sampler()
        return super()._get_train_sampler(train_dataset)

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def length_sampler(self) -> LengthSampler:
        """The order of `length_bucketing`. Lengths are read once for a training set.

        Raises:
            UserError: the training set has no lengths.
        """
        if self._lengths is None or self._lengths[0] is not self.train_dataset:
            main_input = getattr(self.model, "main_input_name", "input_ids")
            lengths = lengths_of(self.train_dataset, self.args.length_column_name, main_input)
            self._lengths = self.train_dataset, lengths
        loader, processes = self.args.accelerator_config, self.args.world_size
        return LengthSampler(
            self._lengths[1],
            self._train_batch_size * (1 if loader.split_batches else processes),
            self._order_seed,
            self.args.dataloader_drop_last,
            fills_last=processes > 1 and loader.even_batches,
        )

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        numbered = self.boundary.wrap(dataset, TRAINING if kwargs.get("is_training") else VALIDATION)
        if numbered is None:
            return super()._get_dataloader(dataset, *args, **kwargs)
        collate, sampler = self.data_collator, kwargs.pop("sampler_fn", None)
        data, self.data_collator = numbered
        try:
            if sampler is not None:
                kwargs["sampler_fn"] = lambda _: sampler(dataset)
            return super()._get_dataloader(data, *args, **kwargs)
        finally:
            self.data_collator = collate

    # ---- evaluation ----

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0 if SKIPPED in inputs else super().floating_point_ops(inputs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs, replayed = self.boundary.take(inputs, VALIDATION)
        with self.boundary.replaying(inputs, replayed):
            return super().prediction_step(model, inputs, *args, **kwargs)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.unfreezing is not None and self.unfreezing.stage is not None and self.is_in_train:
            logs["stage"] = self.unfreezing.stage
            rates = self.unfreezing.rates
            if "loss" in logs and rates:
                if (gain := self.boundary.gain) is not None:
                    logs["cache_gain"] = gain
                logs["learning_rate"] = max(rates.values())  # Trainer's own is the first group's, often frozen
                logs |= {f"learning_rate/{name}": rate for name, rate in rates.items()}
        super().log(logs, start_time)


class TransferTrainer(TransferMixin, Trainer):
    """A `Trainer` whose arguments may carry a Plan: see `TransferMixin`."""


def _count(labels: Any) -> Any:
    """Labels to count: a value of a regression is never -100 for "ignore"."""
    return torch.zeros_like(labels) if torch.is_tensor(labels) and labels.is_floating_point() else labels
