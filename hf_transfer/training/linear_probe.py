"""The best linear head on frozen features: a convex problem.

The input of the head's linear layer is computed once per example, the head is solved for (`features.convex_head`) with
the L2 strength that cross-validation on the training data prefers, and written into the model. `probe_solver: lbfgs`
is a whole linear probe; `head_init: probe` is where two-phase and gradual begin (LP-FT, Kumar et al. 2022, section 3).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_transfer.config.arguments.adaptation import aligns_frozen
from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.data.labels import IGNORED
from hf_transfer.errors import UserError
from hf_transfer.features.averaged_head import AveragedProblem
from hf_transfer.features.convex_head import MULTI, REGRESSION, SINGLE, Head
from hf_transfer.models.heads import MLPHead
from hf_transfer.models.pooled_head import PooledLinear
from hf_transfer.objectives.adaptation.frozen import Alignment, align
from hf_transfer.plan.probe_checks import NOT_CONVEX
from hf_transfer.training.head import HeadLayers, head_layers, head_parameters
from hf_transfer.training.probe_features import features, unlabeled_features
from hf_transfer.training.probe_selection import Examples, Measure, Solution, choose
from hf_transfer.training.running import RunningTrainer

MOST_FOLDED = 10_000  # training examples, up to which cross-validation chooses the L2 strength


def note(args: Any, kept: Sequence[str] = (), fresh: Sequence[str] = ()) -> str:
    """A line about the head for a printed plan; empty if no head is solved for.

    Args:
        args: of the run.
        kept: names of the head's parameters before the layer that is solved for.
        fresh: names of the parameters that the checkpoint does not contain.
    """
    if not wanted(args):
        return ""
    solves = args.probe_solver == "lbfgs"
    said = (
        "The head is solved for (probe_solver: lbfgs): epochs, batch size and learning rates have no effect."
        if solves
        else "The head begins as the solution on the frozen features (head_init: probe)."
    )
    if not kept:
        return said
    plain = [name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in kept]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in plain))
    origin = ", drawn at random," if set(plain) & set(fresh) else ""
    one, several = ("stays as it is", "stay as they are") if solves else ("trains too", "train too")
    verb = one if len(layers) == 1 else several
    shown = " and ".join(layers) if len(layers) < 4 else f"{len(layers)} modules from {layers[0]} to {layers[-1]}"
    return f"{said} That is its last layer; {shown}{origin} {verb}."


def wanted(args: Any) -> bool:
    """Whether a head is solved for; plain `TrainingArguments` lack the keys."""
    return isinstance(args, ProbeArguments) and (args.probe_solver == "lbfgs" or args.head_init == "probe")


# ---- the head --------------------------------------------------------------------------------------------------------


def find_head(trainer: RunningTrainer) -> nn.Linear:
    """The last linear layer of the head, whose output is the model's.

    Raises:
        UserError: there is no such layer, or several side by side.
    """
    last = _solvable(trainer).last
    assert last is not None
    return last


def kept_below(trainer: RunningTrainer) -> tuple[str, ...]:
    """Names of the trainable parameters of the head before its last linear layer.

    Raises:
        UserError: there is no such layer, or several side by side; or it is an MLP, of which no layer is solved for.
    """
    path = _solvable(trainer).paths[-1]
    return tuple(name for name in head_parameters(trainer) if name.rpartition(".")[0] != path)


def _solvable(trainer: RunningTrainer) -> HeadLayers:
    """The layers of a head that ends with a linear layer.

    Raises:
        UserError: it ends otherwise, or is an MLP, of which no layer is solved for.
    """
    layers = head_layers(trainer)
    named, instead = _named(trainer.args)
    if any(isinstance(module, MLPHead) for module in trainer.model.modules()):
        raise UserError(
            f"{named} cannot be combined with an MLP head: {NOT_CONVEX}.", f"Use {instead}, or head: linear."
        )
    if layers.last is not None:
        return layers
    raise UserError(
        f"{named} needs a head that ends with one linear layer, and the trainable part of this model's head is "
        f"{layers.shown}.",
        f"Use {instead}, or a model whose head ends with one linear layer.",
    )


def _named(args: Any) -> tuple[str, str]:
    """(the key that asks for a solution, what to use instead)"""
    if args.probe_solver == "lbfgs":
        return "probe_solver: lbfgs", "probe_solver: sgd"
    return "head_init: probe", "head_init: random"


def check_trainer(trainer: RunningTrainer, has_own_loss: bool) -> None:
    """Check that the trainer's head can be solved for.

    Raises:
        UserError: it cannot, because of the head, the backend or the loss.
    """
    find_head(trainer)
    name, _ = _named(trainer.args)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            f"{name} needs the whole model in each process, and FSDP and DeepSpeed shard it.", "Use plain DDP."
        )
    if has_own_loss and trainer.args.probe_solver == "lbfgs":
        raise UserError(
            f"{name} minimizes the built-in loss, and this trainer has a loss of its own.", "Use probe_solver: sgd."
        )


# ---- the solution ----------------------------------------------------------------------------------------------------


def solve(trainer: RunningTrainer, before: Solution | None = None) -> Solution:
    """Solve for the head of a trainer's model and write it there, the same on all processes.

    Args:
        trainer: whose head it is.
        before: of the same head, before a contrastive stage, which has seen the labels of all folds: on its features
            cross-validation would find every head as good as perfect, and choose the weakest strength. So the strength
            and its score are those of before.

    Raises:
        UserError: the labels make no convex problem.
    """
    began, layer = time.perf_counter(), find_head(trainer)
    train = features(trainer, layer, trainer.train_dataset)
    held_out = trainer.eval_dataset if len(train[1]) > MOST_FOLDED else None
    sets = list(held_out.values()) if isinstance(held_out, dict) else [] if held_out is None else [held_out]
    parts = [features(trainer, layer, one) for one in sets]
    sources = len(train[0]) - trainer.labeled_targets
    trainer.alignment = _aligned(trainer, layer, train[0][:sources])
    if trainer.alignment is not None:
        own, of_target = train[0].tensor_split([sources])
        train = torch.cat([trainer.alignment(own), of_target]), train[1]
        parts = [(trainer.alignment(x), y) for x, y in parts]
    feature_seconds = time.perf_counter() - began
    kind = _problem_type(getattr(trainer.model, "config", None), layer, train[1])
    folded = _labeled(kind, *(one[:sources] for one in train))
    train = _labeled(kind, *train)
    validation = _labeled(kind, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) if parts else None
    answer: list[Any] = [None]
    if trainer.is_world_process_zero():
        loss = trainer.objective.loss
        weights = None if loss is None else loss.weights
        measure = Measure(kind, layer.out_features, trainer.args.metric_for_best_model, weights)
        widths = _parts(trainer.model, layer)
        known = None if before is None else before.l2
        answer = [choose(layer, train, folded, validation, measure, trainer.args.seed, feature_seconds, widths, known)]
    if trainer.args.world_size > 1:
        broadcast_object_list(answer)
    head, solution = answer[0]
    if before is not None:
        seconds = solution.seconds + before.seconds, solution.feature_seconds + before.feature_seconds
        solution = replace(before, loss=solution.loss, seconds=seconds[0], feature_seconds=seconds[1])
    _write(head, layer)
    trainer.solved_on = train if trainer.solves_again else None
    return solution


@dataclass(frozen=True)
class Refit:
    """The head that was solved for again, on the held-out examples too.

    Attributes:
        examples: number of all.
        held_out: number of those that were held out before.
        l2: the L2 strength, which stays.
        loss: mean loss of all examples, without the penalty.
        seconds: of computing the features of the held-out ones, and of solving.
    """

    examples: int
    held_out: int
    l2: float
    loss: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`."""
        return asdict(self)


def solve_again(trainer: RunningTrainer, held_out: Any) -> Refit:
    """Solve for the head on the training examples and others, at the L2 strength that was chosen before.

    The mean loss is minimized, so the same strength weighs as much beside it. The features of the training examples are
    those of the first solution: nothing below the head has changed.

    Args:
        trainer: whose head was solved for, when `solves_again` was set.
        held_out: the other examples, prepared.
    """
    began, layer, loss = time.perf_counter(), find_head(trainer), trainer.objective.loss
    train, solution = trainer.solved_on, trainer.solution
    assert train is not None and solution is not None, "kept by `solve`"
    x, y = features(trainer, layer, held_out)
    x = x if trainer.alignment is None else trainer.alignment(x)
    kind = _problem_type(getattr(trainer.model, "config", None), layer, y)
    x, y = _labeled(kind, x, y)
    answer: list[Any] = [None]
    if trainer.is_world_process_zero():
        every = torch.cat([train[0], x]), torch.cat([train[1], y])
        weights, parts = None if loss is None else loss.weights, _parts(trainer.model, layer)
        whole = AveragedProblem(parts, kind, *every, layer.out_features, weights, layer.bias is not None)
        head = whole.exact(solution.l2)
        seconds = time.perf_counter() - began
        answer = [(head, Refit(len(every[0]), len(x), solution.l2, whole.loss(head, every[0]), seconds))]
    if trainer.args.world_size > 1:
        broadcast_object_list(answer)
    head, refit = answer[0]
    _write(head, layer)
    trainer.solved_on = None
    return refit


def _parts(model: nn.Module, layer: nn.Linear) -> tuple[int, ...]:
    """Widths of the vectors that the layer reads one after the other."""
    heads = (module for module in model.modules() if isinstance(module, PooledLinear) and module.output is layer)
    return next((head.parts for head in heads), (layer.in_features,))


@torch.no_grad()
def _write(head: Head, layer: nn.Linear) -> None:
    """Write a solution into the model."""
    layer.weight.copy_(head.weight)
    if layer.bias is not None:
        assert head.bias is not None
        layer.bias.copy_(head.bias)


def _aligned(trainer: RunningTrainer, layer: nn.Linear, source: torch.Tensor) -> Alignment | None:
    """The map of the source's features to the target's; None where `domain_adaptation` does not align frozen ones."""
    if not aligns_frozen(trainer.args):
        return None
    target = unlabeled_features(trainer, layer, trainer.target_dataset)
    return align(trainer.args.domain_adaptation, source, target)


def _problem_type(config: Any, layer: nn.Linear, labels: torch.Tensor) -> str:
    """The problem type: the configuration's, or the one that transformers derives from the labels.

    Raises:
        UserError: the labels are soft.
    """
    derived = REGRESSION if layer.out_features == 1 else MULTI if labels.is_floating_point() else SINGLE
    kind = getattr(config, "problem_type", None) or derived
    is_binary = kind == MULTI and bool(((labels == 0) | (labels == 1)).all())
    if (kind == SINGLE and labels.is_floating_point()) or (kind == MULTI and not is_binary):
        raise UserError(
            "Solving for a head needs hard labels, and these are soft (probabilities).",
            "Use probe_solver: sgd, and head_init: random.",
        )
    return kind


def _labeled(kind: str, x: torch.Tensor, y: torch.Tensor) -> Examples:
    """Without examples whose label is ignored; regression targets as (examples, outputs)."""
    if kind == SINGLE:
        return x[y != IGNORED], y[y != IGNORED]
    return x, y.reshape(len(y), -1)
