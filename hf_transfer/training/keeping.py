"""Against forgetting: the penalties that hold a trainer's model to the one that it starts from.

The reference is the model as the trainer was given it. A resumed run is given the same one (`run_identity` compares it)
and loads the checkpoint's weights afterwards, so the reference is not part of a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_transfer.adapters.attach import is_adapted, of_backbone
from hf_transfer.config.arguments.forgetting import PENALTIES, ForgettingArguments
from hf_transfer.errors import UserError
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.groups import layer_groups
from hf_transfer.layers.head_layers import in_order, owners
from hf_transfer.layers.identity import identity_of
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.pooled_head import PooledLinear
from hf_transfer.objectives.anchored import Anchors, ewc, l2_sp
from hf_transfer.objectives.distillation import Reader, feature_distillation, logit_distillation
from hf_transfer.objectives.fisher import Fisher
from hf_transfer.objectives.replayed import old_head
from hf_transfer.training.running import RunningTrainer

_WITHOUT_RUN = "`hf-transfer train` and `fine_tune` read it; a `TransferTrainer` cannot."


def wanted(args: Any) -> list[str]:
    """The keys of the penalties that are on."""
    return [name for name in PENALTIES if getattr(args, name) > 0]


def refuse_own_loss(args: Any) -> None:
    """Raises:
    UserError: a penalty is asked for next to a loss of the caller's own.
    """
    for name in wanted(args):
        raise UserError(
            "it is added to the built-in loss, and this trainer has a loss of its own.",
            "Leave it out, or do not override `compute_loss`.",
            key=name,
        )


def teacher_of(args: Any, model: Any) -> nn.Module | None:
    """A copy of the model that features are distilled from; None where that is not asked for.

    Args:
        args: of the trainer.
        model: before it gets an adapter, which changes it in place.
    """
    if not isinstance(args, ForgettingArguments):
        return None
    is_wanted = args.distillation_alpha > 0 and not args.teacher_model_name_or_path
    return copy.deepcopy(model) if is_wanted else None


def add_penalties(trainer: RunningTrainer, teacher: nn.Module | None) -> None:
    """Add the penalties of the keys, as far as the model alone makes them.

    Args:
        trainer: with its plan, if it has one.
        teacher: what `teacher_of` gave.

    Raises:
        UserError: a key does not fit the model, the plan or the backend.
    """
    args, keys = trainer.args, wanted(trainer.args)
    for name in keys:
        _check_backend(trainer, name)
    held = [n for n in keys if n != "distillation_alpha"]
    for name in held:
        _check_trains(trainer, name)
    if "l2_sp_alpha" in keys:
        fresh = lambda: _fresh(trainer)  # noqa: E731
        trainer.objective.penalties += l2_sp(args.l2_sp_alpha, args.l2_sp_beta, _anchors(trainer), fresh)
    if "ewc_lambda" in keys and args.ewc_fisher_file:
        consolidate(trainer, Fisher.load(Path(args.ewc_fisher_file).expanduser()))
    if "distillation_alpha" in keys and not args.teacher_model_name_or_path:
        _check_trains(trainer, "distillation_alpha", through_adapter=True)
        _imitate(trainer, copy.deepcopy(trainer.model) if teacher is None else teacher)
    trainer.boundary.blocked += _blocks_cache(args)


def check_complete(trainer: RunningTrainer) -> None:
    """Called before training.

    Raises:
        UserError: a key names what nobody has read.
    """
    made = {penalty.name for penalty in trainer.objective.penalties}
    needs = (
        ("ewc_dataset_name", "ewc_lambda" in made),
        ("teacher_model_name_or_path", "distillation_alpha" in made),
        ("replay_dataset_name", trainer.replay is not None),
    )
    for name, is_read in needs:
        if getattr(trainer.args, name) and not is_read:
            raise UserError(f"nothing has read {getattr(trainer.args, name)!r}.", _WITHOUT_RUN, key=name)


def consolidate(trainer: RunningTrainer, fisher: Fisher) -> None:
    """Add the penalty of EWC.

    Raises:
        UserError: the Fisher information is of another model.
    """
    names = plain_names(trainer.model)
    held, head = [n for n in _held(trainer) if names[n] in fisher.values], _head(trainer)
    tensors = identity_of(trainer.model)["tensors"]
    of_head = {names[n] for n in _groups(trainer)[-1].parameters}
    fisher.check({n: digest for n, digest in tensors.items() if n not in of_head}, [names[n] for n in held])
    same_head = [n for n in head if names[n] in fisher.values and tensors.get(names[n]) == fisher.tensors[names[n]]]
    diagonal = {n: fisher.values[names[n]] for n in (*held, *same_head)}
    fresh = lambda: _fresh(trainer)  # noqa: E731
    trainer.objective.penalties.append(ewc(trainer.args.ewc_lambda, _anchors(trainer), diagonal, fresh))


def teach(trainer: RunningTrainer, teacher: nn.Module, problem_type: str, order: Sequence[int] = ()) -> None:
    """Add the penalty of distillation from a teacher with the labels of the run.

    Args:
        trainer: before its first step.
        teacher: is moved to the trainer's device and frozen.
        problem_type: of both.
        order: of the teacher's outputs, as the run's labels are ordered; empty where it is the same.
    """
    args = trainer.args
    trainer.objective.penalties.append(
        logit_distillation(
            args.distillation_alpha, args.distillation_temperature, teacher.to(args.device), problem_type, order
        )
    )


def replay_with(trainer: RunningTrainer, head: Mapping[str, torch.Tensor], problem_type: str) -> None:
    """Add the loss of an old head on replayed examples of its task.

    Args:
        trainer: before its first step.
        head: parameters by name, on the trainer's device.
        problem_type: of the old task.

    Raises:
        UserError: nothing below the head trains, or the backend shards the model.
    """
    _check_backend(trainer, "replay_dataset_name")
    _check_trains(trainer, "replay_dataset_name", through_adapter=True)
    trainer.objective.penalties.append(old_head(head, problem_type))


def head_of(trainer: RunningTrainer) -> tuple[str, ...]:
    """Names of the head's parameters."""
    names: tuple[str, ...] = tuple(_groups(trainer)[-1].parameters)
    return names


def _blocks_cache(args: Any) -> list[str]:
    """Why the frozen part of a batch cannot be replayed; empty if it can."""
    reasons = []
    if args.distillation_alpha > 0:
        reasons.append("distillation_alpha: the teacher reads the inputs of every batch")
    if args.replay_dataset_name:
        reasons.append("replay_dataset_name mixes examples of another dataset into the batches")
    return reasons


def values(trainer: RunningTrainer) -> Mapping[str, float]:
    """The newest terms of the loss by key, each with its weight: of the last micro-batch, the mean over the processes.

    All processes must call it together. A checkpoint holds the history of one process, for all of them.
    """
    found = trainer.objective.values
    if trainer.args.world_size == 1 or not found:
        return {f"penalty/{name}": float(value) for name, value in found.items()}
    terms = torch.stack([value.to(trainer.args.device, torch.float32) for value in found.values()])
    means = trainer.accelerator.reduce(terms, "mean").tolist()
    return {f"penalty/{name}": mean for name, mean in zip(found, means, strict=True)}


def advice(trainer: RunningTrainer) -> str:
    """What to lower where the loss is NaN or infinite, as a sentence; empty without penalties."""
    objective = trainer.objective
    bad = [name for name, value in objective.values.items() if not bool(torch.isfinite(value))]
    names = bad or [name for name in objective.values if name in PENALTIES]
    if not names:
        return ""
    which = " and ".join(names)
    return f"Lower {which}, whose term is not finite. " if bad else f"The loss includes {which}: lower it. "


# ---- what is held ----------------------------------------------------------------------------------------------------


def _groups(trainer: RunningTrainer) -> Any:
    return trainer.layer_groups or layer_groups(trainer.model, trainer.args.layer_rules or ())


def _trainable(trainer: RunningTrainer) -> set[str]:
    """Names of the parameters that may train."""
    return set(trainer.trainable) or {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def _head(trainer: RunningTrainer) -> list[str]:
    """Trainable parameters of the head."""
    may = _trainable(trainer)
    return [name for name in _groups(trainer)[-1].parameters if name in may]


def _held(trainer: RunningTrainer) -> list[str]:
    """Trainable pretrained parameters below the head."""
    may = _trainable(trainer)
    names = [name for group in _groups(trainer)[:-1] for name in group.parameters if name in may]
    return of_backbone(trainer.model, names)


def _fresh(trainer: RunningTrainer) -> list[str]:
    """Trainable parameters that are not pretrained: the head's, unless the caller says that it came with the model."""
    return [] if trainer.keeps_head else _head(trainer)


def _anchors(trainer: RunningTrainer) -> Anchors:
    """The weights as they are now; L2-SP and EWC share them."""
    if trainer.anchors is None:
        trainer.anchors = Anchors(trainer.model, {*_held(trainer), *_head(trainer)})
    anchors: Anchors = trainer.anchors
    return anchors


def _check_backend(trainer: RunningTrainer, key: str) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "it needs the whole model in each process, and FSDP and DeepSpeed shard it.", "Use plain DDP.", key=key
        )
    if trainer.args.n_gpu > 1:
        raise UserError(
            "DataParallel computes the loss on copies of the model.", "Start a process per GPU with --launch ddp.", key
        )
    if trainer.args.probe_solver == "lbfgs":
        raise UserError("probe_solver: lbfgs solves for the head without steps.", "Leave one of them out.", key=key)


def _check_trains(trainer: RunningTrainer, key: str, through_adapter: bool = False) -> None:
    """Raises:
    UserError: nothing moves that the penalty would hold.
    """
    if trainer.plan is not None and all(g == HEAD for stage in trainer.plan.stages for g in stage.trainable):
        raise UserError(
            "the plan trains nothing below the head, so nothing pretrained can be forgotten.",
            f"Leave {key} out, or use another strategy.",
            key=key,
        )
    if is_adapted(trainer.model) and not through_adapter and not _held(trainer):
        raise UserError(
            "with this adapter, all pretrained weights are frozen, and there is nothing to hold.",
            f"Leave {key} out; distillation_alpha holds the features that the adapter changes.",
            key=key,
        )


# ---- the pretrained model as teacher ---------------------------------------------------------------------------------


def _imitate(trainer: RunningTrainer, teacher: nn.Module) -> None:
    """Add the penalty of distillation from the pretrained model."""
    rules = trainer.args.layer_rules or ()
    of_teacher, of_model = (Reader(_first_of_head(model, rules)) for model in (teacher, trainer.model))
    trainer.objective.penalties.append(
        feature_distillation(trainer.args.distillation_alpha, teacher.to(trainer.args.device), of_teacher, of_model)
    )


def _first_of_head(model: nn.Module, rules: Any) -> nn.Module:
    """The head's first layer; what it reads is pretrained.

    Raises:
        UserError: the model has no head with parameters.
    """
    names = layer_groups(model, rules)[-1].parameters
    paths = [path for path in owners(in_order(model, names)) if ".original_module" not in path]
    if not paths:
        raise UserError("the model has no head whose features could be compared.", key="distillation_alpha")
    owner = model.get_submodule(paths[0].rpartition(".")[0])
    return owner if isinstance(owner, PooledLinear) else model.get_submodule(paths[0])  # before it standardizes
