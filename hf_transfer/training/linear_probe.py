"""The best linear head on frozen features: a convex problem.

What enters the head's one linear layer is computed once for every example, the head is solved for (`convex`), with the
L2 strength that validates best, and written into the model. `probe_solver: lbfgs` is a whole linear probe;
`head_init: probe` is where two-phase and gradual begin (LP-FT, Kumar et al. 2022, section 3).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn

from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.features.convex_head import MULTI, REGRESSION, SINGLE, STRENGTHS, Head, Problem
from hf_transfer.features.examples import Source, batches_by_length, lengths_of
from hf_transfer.objectives.losses import IGNORED
from hf_transfer.plan.strategies import STRATEGIES
from hf_transfer.training import ddp
from hf_transfer.training.running import RunningTrainer

FOLDS = 5
# Strengths without gain, in the measure or the loss, after which weaker ones, which take longest, are not tried.
PATIENCE = 3
_ERRORS = ("mae", "rmse", "ece")  # metrics of which less is better
_BEGINS_WITH_A_HEAD = ("auto", "two-phase", "gradual")


def check(args: Any) -> list[str]:
    """Problems of the keys, a sentence each. `args` has the keys of plan, adapter and loss too."""
    found = []
    chosen = "stages" if args.stages is not None else args.strategy
    named = "no strategy" if chosen is None else "stages" if chosen == "stages" else f"strategy: {chosen}"
    known_strategy = chosen in (None, "stages", *STRATEGIES)
    if args.head_init == "probe" and known_strategy and chosen not in _BEGINS_WITH_A_HEAD:
        found.append(f"head_init: 'probe' has no effect with {named}; it belongs to two-phase and gradual.")
    if args.probe_solver != "lbfgs":
        return found
    if known_strategy and chosen != "linear-probe":
        found.append(f"probe_solver: 'lbfgs' has no effect with {named}; it belongs to linear-probe.")
    if args.adapter not in (None, "none"):
        found.append("probe_solver: 'lbfgs' solves for a head on fixed features, which an adapter would change.")
    found += [
        f"probe_solver: 'lbfgs' has no convex problem with {name}; leave it out, or take probe_solver: sgd."
        for name in ("focal_gamma", "label_smoothing_factor", "balanced_sampling")
        if getattr(args, name)
    ]
    return found


def check_run(values: Mapping[str, Any]) -> list[str]:
    """Keys of a run's data that leave no fixed features to solve for."""
    mixes = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "streaming": False}
    changes = {**mixes, "augmentation": "none", "random_erasing": None, "token_masking": 0.0}
    solves = values["probe_solver"] == "lbfgs"
    if not solves and values["head_init"] != "probe":
        return []
    named, refused = ("probe_solver: 'lbfgs'", changes) if solves else ("head_init: 'probe'", mixes)
    return [
        f"{named} needs the same features and labels whenever it looks, and {name} gives others; leave it out, or take "
        f"{'probe_solver: sgd' if solves else 'head_init: random'}."
        for name, nothing in refused.items()
        if values[name] not in (nothing, 0.0)
    ]


def note(args: Any) -> str:
    """What a printed plan does not say; empty where it says all."""
    if args.probe_solver == "lbfgs":
        return "The head is solved for (probe_solver: lbfgs): epochs, batches and learning rates have no say."
    return "The head begins as the solution on the frozen features (head_init: probe)." if wanted(args) else ""


def wanted(args: Any) -> bool:
    """Whether a head is solved for at all; plain `TrainingArguments` lack the keys."""
    return isinstance(args, ProbeArguments) and (args.probe_solver == "lbfgs" or args.head_init == "probe")


# ---- the head --------------------------------------------------------------------------------------------------------


def find_head(trainer: RunningTrainer) -> nn.Linear:
    """The one linear layer that the head is.

    Raises:
        UserError: the head is something else.
    """
    trains = [name for name in trainer.layer_groups[-1].parameters if name in trainer.trainable]
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in trains))
    modules = [trainer.model.get_submodule(path) for path in paths]
    if len(modules) == 1 and isinstance(modules[0], nn.Linear):
        return modules[0]
    solves = trainer.args.probe_solver == "lbfgs"
    named, instead = (
        ("probe_solver: lbfgs", "probe_solver: sgd") if solves else ("head_init: probe", "head_init: random")
    )
    shown = ", ".join(f"{path} ({type(m).__name__})" for path, m in zip(paths, modules, strict=True))
    raise UserError(
        f"{named} solves for a head of one linear layer, and what trains in this model's head is {shown or 'nothing'}.",
        f"Use {instead}, or a model whose head is one linear layer.",
    )


def check_trainer(trainer: RunningTrainer, has_own_loss: bool) -> None:
    """Raises:
    UserError: the trainer or its backend has no head that can be solved for.
    """
    find_head(trainer)
    name = "probe_solver: lbfgs" if trainer.args.probe_solver == "lbfgs" else "head_init: probe"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            f"{name} needs the whole model in each process, which FSDP and DeepSpeed split.", "Use plain DDP."
        )
    if has_own_loss and trainer.args.probe_solver == "lbfgs":
        raise UserError(f"{name} minimises our loss, and this trainer has a loss of its own.", "Use probe_solver: sgd.")


# ---- features --------------------------------------------------------------------------------------------------------


class _Watch:
    """Notes what enters a layer, and what it returns."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __enter__(self) -> _Watch:
        self.handle = self.layer.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.seen, self.output = inputs[0], output

    def vectors(self, batch: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
        """(examples, width): where the head reads every token, of the last that is no padding.

        Raises:
            UserError: the model's answer is not what the layer returned.
        """
        seen, output = self.seen, self.output
        if seen.ndim == 3:
            mask = batch.get("attention_mask")
            places = torch.arange(seen.shape[1], device=seen.device)
            last = (places if mask is None else mask * places).expand(len(seen), -1).argmax(-1)
            rows = torch.arange(len(seen), device=seen.device)
            seen, output = seen[rows, last], output[rows, last]
        if output.shape != logits.shape or not torch.allclose(output.float(), logits.float(), rtol=1e-3, atol=1e-4):
            raise UserError(
                "The model's answer is not what its head's linear layer returns: something follows it.",
                "Use probe_solver: sgd, and head_init: random.",
            )
        return seen


def features(trainer: RunningTrainer, layer: nn.Linear, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """((examples, width) inputs of `layer` in fp32, labels) of a data set, each computed once, on all processes.

    In eval mode, without gradient, in the run's precision; texts of like length together.

    Raises:
        UserError: the data set has no length or no labels.
        WorkFailed: a feature is not a number.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise UserError("A head is solved for on all examples at once, and the data set has no length.", "Give a list.")
    args, model = trainer.args, trainer.model
    source = Source.of(trainer, "features", dataset)
    is_text = isinstance(source.dataset, Dataset) and "input_ids" in source.dataset.column_names
    lengths = lengths_of(source.dataset) if is_text else None
    mine = batches_by_length(len(dataset), lengths, args.eval_batch_size)[args.process_index :: args.world_size]
    workers = {"num_workers": max(args.dataloader_num_workers, 0), "pin_memory": args.dataloader_pin_memory}
    loader = torch.utils.data.DataLoader(source.dataset, batch_sampler=mine, collate_fn=source.collate, **workers)
    parts = []
    with ddp.without_a_trace(model), torch.no_grad(), _Watch(layer) as watch, trainer.accelerator.autocast():
        model.eval()
        for places, batch in zip(mine, loader, strict=True):
            inputs = dict(trainer._prepare_inputs(batch))
            if "labels" not in inputs:
                raise UserError("A head is solved for by labels, and the examples have none.", "Call them `labels`.")
            labels = inputs.pop("labels")
            output = model(**inputs)
            vectors = watch.vectors(inputs, output["logits"] if isinstance(output, dict) else output[0])
            parts.append((places, vectors.float().cpu(), labels.cpu()))
    if args.world_size > 1:
        parts = gather_object(parts)
    back = torch.tensor([place for places, _, _ in parts for place in places]).argsort()
    found, labels = torch.cat([x for _, x, _ in parts])[back], torch.cat([y for _, _, y in parts])[back]
    bad = int((~torch.isfinite(found).all(-1)).sum())
    if bad:
        raise WorkFailed(
            f"The frozen model's features are not numbers for {bad:,} examples.", "Look at them, or at the precision."
        )
    return found, labels


# ---- the solution ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """What was solved for.

    Attributes:
        l2: the strength that was chosen.
        held_out: what it was chosen on.
        measure: by what.
        score: of the held-out examples at that strength.
        loss: mean training loss, without the penalty.
        solutions: strengths that were tried.
        seconds: of solving.
        feature_seconds: of computing the features.
    """

    l2: float
    held_out: str
    measure: str
    score: float
    loss: float
    solutions: int
    seconds: float
    feature_seconds: float

    def __str__(self) -> str:
        return (
            f"probe: L2 {self.l2:.2g} of {STRENGTHS[-1]:.0e} … {STRENGTHS[0]:.0e}, {self.held_out} {self.measure} "
            f"{self.score:.4f} ({self.solutions} solutions in {self.seconds:.1f} s, features in "
            f"{self.feature_seconds:.1f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "l2_grid": list(STRENGTHS)}

    def to_log(self) -> dict[str, Any]:
        return {f"probe_{name}": value for name, value in asdict(self).items() if not isinstance(value, str)}


def solve(trainer: RunningTrainer) -> Solution:
    """Solve for the head of a trainer's model and write it there, the same on all processes.

    Raises:
        UserError: the labels are of no convex problem.
    """
    began, layer = time.perf_counter(), find_head(trainer)
    held_out = trainer.eval_dataset
    sets = list(held_out.values()) if isinstance(held_out, dict) else [] if held_out is None else [held_out]
    train = features(trainer, layer, trainer.train_dataset)
    parts = [features(trainer, layer, one) for one in sets]
    took = time.perf_counter() - began
    kind = _kind(getattr(trainer.model, "config", None), layer, train[1])
    train = _known(kind, *train)
    validation = _known(kind, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) if parts else None
    answer: list[Any] = [None]
    if trainer.is_world_process_zero():
        weights = trainer._loss.weights if trainer._loss is not None else None
        measure = Measure(kind, layer.out_features, trainer.args.metric_for_best_model)
        answer = [_choose(kind, train, validation, layer, weights, measure, trainer.args.seed, took)]
    if trainer.args.world_size > 1:
        broadcast_object_list(answer)
    head, solution = answer[0]
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        if layer.bias is not None:
            layer.bias.copy_(head.bias)
    return solution


def _kind(config: Any, layer: nn.Linear, labels: torch.Tensor) -> str:
    """The problem type, by the model's configuration or as transformers sees it by the labels.

    Raises:
        UserError: labels that are shares.
    """
    said = getattr(config, "problem_type", None)
    seen = REGRESSION if layer.out_features == 1 else MULTI if labels.is_floating_point() else SINGLE
    kind = said or seen
    bits = kind == MULTI and bool(((labels == 0) | (labels == 1)).all())
    if (kind == SINGLE and labels.is_floating_point()) or (kind == MULTI and not bits):
        raise UserError(
            "A head is solved for where each label is there or not, and these labels are shares.",
            "Use probe_solver: sgd, and head_init: random.",
        )
    return kind


def _known(kind: str, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without examples whose label is to be ignored; a value each of a regression as a column."""
    if kind == SINGLE:
        return x[y != IGNORED], y[y != IGNORED]
    return x, y.reshape(len(y), -1)


class Measure:
    """What a strength is chosen by: `metric_for_best_model` where it is one of ours, else accuracy, or the loss."""

    def __init__(self, kind: str, outputs: int, metric_for_best_model: str | None):
        from hf_transfer.evaluation import metrics  # slow to import

        self.kind = kind
        wanted = (metric_for_best_model or "").removeprefix("eval_")
        known = wanted in metrics.names(kind, outputs)
        self.metric = wanted if known else "accuracy" if kind == SINGLE and wanted != "loss" else ""
        self.sign = -1.0 if self.metric in _ERRORS else 1.0
        self.name = self.metric or "loss"

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
        """(as it is shown, what is to be maximised, what among equals: minus the loss)"""
        from hf_transfer.evaluation import metrics

        loss = self._loss(logits, labels)
        if not self.metric:
            return loss, -loss, -loss
        truth = labels[:, 0] if self.kind == REGRESSION and labels.shape[1] == 1 else labels
        value = metrics.compute(self.kind, logits.numpy(), truth.numpy()).get(self.metric, float("-inf"))
        return value, self.sign * value, -loss

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        if self.kind == REGRESSION:
            return float((logits - labels).square().mean())
        if self.kind == MULTI:
            return float(nn.functional.binary_cross_entropy_with_logits(logits, labels.double()))
        return float(nn.functional.cross_entropy(logits, labels))


def _choose(
    kind: str,
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor] | None,
    layer: nn.Linear,
    weights: torch.Tensor | None,
    measure: Measure,
    seed: int,
    took: float,
) -> tuple[Head, Solution]:
    """The head at the strength that validates best; among equals the stronger."""
    began = time.perf_counter()

    def problem(x: torch.Tensor, y: torch.Tensor) -> Problem:
        return Problem(kind, x, y, layer.out_features, weights, layer.bias is not None)

    whole = problem(*train)
    if validation is not None:
        named, folds = "validation", [(whole, *validation)]
    else:
        splits = _folds(kind, train[1], seed)
        named = f"{len(splits)}-fold cross-validation"
        x, y = train
        folds = [(problem(x[a], y[a]), x[b], y[b]) for a, b in splits]
    labels = torch.cat([y for _, _, y in folds])
    paths = zip(*(one.path(STRENGTHS) for one, _, _ in folds), strict=True)
    seen: list[tuple[float, float, float]] = []
    best = least = 0
    for i, heads in enumerate(paths):
        logits = torch.cat([head.logits(x) for head, (_, x, _) in zip(heads, folds, strict=True)])
        seen.append(measure(logits, labels))
        best = i if seen[i][1:] > seen[best][1:] else best
        least = i if seen[i][2] > seen[least][2] else least
        if i - max(best, least) >= PATIENCE:
            break
    head = whole.exact(STRENGTHS[best])
    seconds = time.perf_counter() - began
    loss = whole.loss(head, train[0])
    return head, Solution(STRENGTHS[best], named, measure.name, seen[best][0], loss, len(seen), seconds, took)


def _folds(kind: str, labels: torch.Tensor, seed: int) -> Sequence[tuple[Any, Any]]:
    """(training rows, held-out rows), as many of each class in every fold."""
    from sklearn.model_selection import KFold, StratifiedKFold

    count = min(FOLDS, len(labels))
    if count < 2:
        raise UserError("A head cannot be solved for by one example.", "Give more, or use probe_solver: sgd.")
    if kind == SINGLE and int(labels.bincount().max()) >= count:
        with warnings.catch_warnings():  # of classes with fewer examples than folds
            warnings.simplefilter("ignore", UserWarning)
            return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, labels))
    return list(KFold(count, shuffle=True, random_state=seed).split(labels))
