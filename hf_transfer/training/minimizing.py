"""A Trainer that minimizes an `Objective`: its loss, the weights of micro-batches, and penalties with what they train.

What is overridden, and why that hook:

- `compute_loss`, `_get_num_items_in_batch`: the gradient of an accumulated batch equals that of the same examples in
  one batch (`objectives.objective`).
- `training_step`: the last micro-batch of an optimizer step completes the gradients of penalties' parameters, which are
  not in the model and which DistributedDataParallel does not know.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.data.replay import EARLIER
from hf_transfer.errors import UserError
from hf_transfer.objectives.objective import MicroBatch, Objective, make_objective
from hf_transfer.training import keeping
from hf_transfer.training.holding import Holding


class PenaltyGradients(TrainerCallback):
    """Clears the gradients of penalties' parameters before each optimizer step: Trainer clears the model's."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for parameter in self.objective.named_parameters().values():
            parameter.grad = None


class Minimizing(Holding):
    """The objective; see `TransferMixin`."""

    unfreezing: Any = None

    def _set_objective(self, has_plan: bool) -> None:
        """A loss of the caller's own keeps Trainer's behavior.

        Raises:
            UserError: keys of our loss are set next to a loss of the caller's own.
        """
        overrides = [cls for cls in type(self).__mro__ if "compute_loss" in vars(cls)]
        if overrides != [Minimizing, Trainer] or self.compute_loss_func is not None:
            if self.args.class_weights not in (None, "none") or self.args.focal_gamma:
                raise UserError(
                    "class_weights and focal_gamma change the built-in loss, and this trainer has a loss of its own.",
                    "Leave them out, or do not override `compute_loss`.",
                )
            keeping.refuse_own_loss(self.args)
            return
        config = getattr(self.model, "config", None)
        self.objective = make_objective(self.args, config, self.train_dataset, has_plan)
        if self.objective.loss is not None and self.objective.loss.always:  # it smooths labels itself
            self.label_smoother = None
        # Trainer counts the items of an accumulated batch only for models that accept the count; we need it for all.
        self.model_accepts_loss_kwargs |= self.objective.weighs_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective on a micro-batch; in an evaluation, the mean of the model's own loss."""
        if self.objective.is_default:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        trainer_loss = super().compute_loss
        # The count is over all processes, and gradients are averaged over them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        batch = MicroBatch(dict(inputs), num_items_in_batch, processes)
        inputs = {name: value for name, value in inputs.items() if name != EARLIER}
        trains = self.model.training or (self.unfreezing is not None and self.unfreezing.is_probing)
        with self.objective.watching(self.model, batch.inputs) if trains else contextlib.nullcontext():
            loss, outputs = self.objective.compute(
                model, batch, lambda num_items: trainer_loss(model, inputs, True, num_items), trains
            )
        if trains:
            loss = self.objective.add_penalties(loss, self.model, batch, outputs, self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        shared = self.args.average_tokens_across_devices and self.args.world_size > 1
        weight = self.objective.count(batch_samples, device, self.accelerator.gather if shared else None)
        if weight is not None:
            return weight
        return super()._get_num_items_in_batch(self.objective.countable(batch_samples), device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            for parameter in self.objective.named_parameters().values():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.args.world_size
        return loss
