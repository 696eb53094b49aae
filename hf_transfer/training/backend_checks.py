"""What a plan needs from the trainer, its optimizer and its distributed backend; checked before training."""

from __future__ import annotations

from typing import Any

import torch

from hf_transfer.errors import UserError
from hf_transfer.layers.blocks import block_classes
from hf_transfer.plan.plan import Plan
from hf_transfer.training import adalora
from hf_transfer.training.best_metric import check_metric
from hf_transfer.training.running import RunningTrainer


def check_backend(trainer: RunningTrainer, plan: Plan) -> None:
    """Check that the trainer can execute the plan.

    Raises:
        UserError: it cannot; with the alternative.
    """
    args = trainer.args
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise UserError(
            "A plan creates its own optimizer groups, so `optimizers=` cannot be given with one.",
            "Choose the optimizer with `optim` or `optimizer_cls_and_kwargs`.",
        )
    if len(plan.stages) > 1:
        _check_stages(trainer, plan)
    _check_ranks(trainer, plan)
    if plan.waits and args.eval_strategy == "no":
        raise UserError("unfreeze_trigger: plateau needs evaluations, and there are none.", "Set eval_strategy: epoch.")
    check_metric(trainer, plan)
    if plan.waits and args.unfreeze_restore_best and trainer.is_fsdp_enabled:
        raise UserError(
            "unfreeze_restore_best keeps a copy of the weights, which FSDP shards.",
            "Set unfreeze_restore_best: false.",
        )
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (vars(args).get(name) or {}).get("use_reentrant"):
            raise UserError(
                f"{name}: with use_reentrant: true, trainable layers above frozen ones get no gradient.",
                "Leave it out: the non-reentrant implementation is the default.",
            )


def shard_blocks(trainer: RunningTrainer) -> None:
    """Let FSDP 2 shard the blocks of the layer groups, unless its configuration names classes.

    accelerate would take `_no_split_modules`, which for BERT names its embeddings and parts of a block too, and which
    timm's models do not have.
    """
    if not (trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2):
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None and (classes := block_classes(trainer.model, trainer.layer_groups)):
        plugin.transformer_cls_names_to_wrap = list(classes)


def _check_stages(trainer: RunningTrainer, plan: Plan) -> None:
    """What cannot change the trainable parameters during training is refused."""
    fsdp1 = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    for enabled, name in ((trainer.is_deepspeed_enabled, "DeepSpeed"), (fsdp1, "FSDP 1")):
        if enabled:
            raise UserError(
                f"strategy {plan.strategy} changes what trains, which {name} does not support during training.",
                "Use a strategy with one stage (linear-probe, partial, full), FSDP 2 (fsdp_version: 2) or plain data "
                "parallelism.",
            )


def _check_ranks(trainer: RunningTrainer, plan: Plan) -> None:
    """AdaLoRA compares the gradients of all adapted layers at each step."""
    if not adalora.allocates(trainer.model):
        return
    adapted = {g.name for g in trainer.layer_groups if any(".lora_" in name for name in g.parameters)}
    if any(not adapted <= set(stage.trainable) for stage in plan.stages):
        raise UserError(
            f"adapter: adalora distributes ranks over all adapted layers, of which {plan.strategy} or freeze trains "
            "only some, or not all from the start.",
            "Use strategy: full without freeze, or adapter: lora.",
        )


def check_optimizer_class(cls: Any, kwargs: dict[str, Any], optim: str) -> None:
    """Check that an optimizer takes the plan's parameter groups.

    Raises:
        UserError: it creates groups of its own (LOMO, GaLore, layer-wise optimizers).
    """
    is_ordinary = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    if not is_ordinary or {"params", "model", "optimizer_dict"} & set(kwargs):
        raise UserError(
            f"optim: {optim} creates its own parameter groups, so a plan cannot set its learning rates.",
            "Use an ordinary optimizer such as adamw_torch_fused.",
        )
