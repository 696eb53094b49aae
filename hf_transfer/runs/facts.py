"""What `results.json` says of a run: its metrics, and what was run, on what, and what it took."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

from transformers import EvalPrediction

from hf_transfer.adapters.attach import is_adapted, name_of
from hf_transfer.data.labels import LABELS, SINGLE_LABEL
from hf_transfer.data.splits import Data
from hf_transfer.evaluation import conformal
from hf_transfer.evaluation.by_class import most_confused, named
from hf_transfer.evaluation.diagnostics import Change, diagnose
from hf_transfer.evaluation.measure import held_out_metrics, metrics_of_prediction, without_speed
from hf_transfer.evaluation.scores import Array
from hf_transfer.evaluation.standing import against_baseline
from hf_transfer.evaluation.thresholds import logits_of
from hf_transfer.models.heads import head_of
from hf_transfer.runs.kept import kept
from hf_transfer.runs.machine import device_name
from hf_transfer.settings import Config
from hf_transfer.tasks.base import Task
from hf_transfer.training.arguments import TransferArguments
from hf_transfer.training.trainer import TransferTrainer

_VERSIONS = ("torch", "transformers", "accelerate", "datasets", "peft", "timm", "torchvision")


class Validated(NamedTuple):
    """What was measured on the validation split.

    Attributes:
        metrics: by name.
        prediction: logits and labels.
        kept: which weights they are of.
    """

    metrics: dict[str, float]
    prediction: EvalPrediction
    kept: dict[str, Any] | None


def validated(trainer: TransferTrainer, problem_type: str) -> Validated:
    """Metrics of the trained model on the validation split.

    The model's configuration gets the scores of the validation split that prediction sets are made from.
    """
    values, prediction = _evaluated(trainer)
    if problem_type == SINGLE_LABEL:
        record = conformal.record_of(logits_of(prediction.predictions), prediction.label_ids)
        setattr(trainer.model.config, conformal.ENTRY, record)
    compared = trainer.course.compare(prediction) if trainer.course else None
    return Validated(values, prediction, kept(trainer, problem_type, values, compared))


def measured(
    trainer: TransferTrainer,
    prepared: dict[str, Any],
    data: Data,
    validation: Validated,
    seen: Callable[[str, Any, Any], None] | None = None,
    change: Change | None = None,
) -> dict[str, Any]:
    """Metrics of the held-out splits; intervals, the baseline and the classes for the one that counts.

    Args:
        trainer: with the saved model.
        prepared: prepared examples by split.
        data: with encoded labels.
        validation: what was measured on the validation split; it counts where there is no test split.
        seen: is given the name of the split that counts, its (examples, outputs) logits and its labels.
        change: what was done to the logits after training; None for nothing.
    """
    problem_type, names = data.labels.problem_type, data.labels.names
    if "test" in prepared:
        split, held_out = "test", held_out_metrics(trainer, prepared["test"], problem_type)
    else:
        split, held_out = "validation", metrics_of_prediction(trainer, *validation[:2], problem_type)
    if seen is not None:
        seen(split, held_out["logits"], held_out["labels"])
    baseline = against_baseline(
        problem_type,
        names,
        _labels(data.train),
        _labels(data.splits[split]),
        held_out["metrics"],
        held_out["intervals"],
    )
    confusions = most_confused(held_out["confusion"]) if problem_type == SINGLE_LABEL else []
    return {
        "metrics": held_out["metrics"],
        "metrics_split": split,
        "validation_metrics": validation.metrics,
        "intervals": held_out["intervals"],
        "baseline": baseline,
        "per_class": named(names, held_out["per_class"]),
        "confusion": held_out["confusion"],
        "diagnostics": diagnose(problem_type, names, held_out["logits"], held_out["labels"], change),
        "confusions": [{"true": names[i], "predicted": names[j], "count": n} for i, j, n in confusions],
        "kept": validation.kept,
    }


def _labels(split: Any) -> Array:
    return split.with_format("numpy", columns=[LABELS])[LABELS][:]


def _evaluated(trainer: TransferTrainer) -> tuple[dict[str, float], Any]:
    """(metrics of the validation split, logits and labels) from one evaluation."""
    own, seen = trainer.compute_metrics, list[Any]()

    def noted(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        assert own is not None, "given by `make_trainer`"
        return own(prediction)

    trainer.compute_metrics = noted
    try:
        return without_speed(trainer.evaluate(), "eval_"), seen[-1]
    finally:
        trainer.compute_metrics = own


def facts_of(config: Config, task: Task, data: Data, trainer: TransferTrainer) -> dict[str, Any]:
    """The rest of `results.json`: what was run, on what, and what it took."""
    plan, args, seconds = trainer.plan, config.training, trainer.seconds
    seen = len(data.train) * (trainer.state.epoch or 0)
    if config.data.streaming:
        seen = trainer.state.global_step * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
    return {
        "task": task.name,
        "problem_type": data.labels.problem_type,
        "model": config.model.model_name_or_path,
        "backbone": _backbone(config, trainer),
        "strategy": plan.strategy if plan is not None else None,
        "adapter": name_of(args, trainer.model),
        "head": head_of(trainer.model.config),
        "dataset": config.data.dataset_name or config.data.train_file,
        "labels": list(data.labels.names),
        "num_train_examples": seen if config.data.streaming else len(data.train),
        "plan": plan.to_list() if plan is not None else [],
        "layer_groups": [group.name for group in trainer.layer_groups],
        **({"contrastive": trainer.contrast.to_dict()} if trainer.contrast is not None else {}),
        **({"probe": trainer.solution.to_dict()} if trainer.solution is not None else {}),
        "stages": [
            {**record.to_dict(), "cache": trainer.boundary.summary(i)} for i, record in enumerate(trainer.stage_records)
        ],
        **trainer.choices.to_dict(),
        "ema": trainer.ema.to_dict(),
        "train_seconds": seconds,
        "time_budget": trainer.time_budget.to_dict(),
        "train_samples_per_second": seen / max(seconds, 1e-9),
        "trainable_parameters": _trained(trainer),
        "total_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": args.seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS}},
        "device": device_name(args.device.type),
        "cost": _cost(args, seconds * args.world_size / 3600),
    }


def _trained(trainer: TransferTrainer) -> int:
    """Parameters that trained: where plateaus end stages, the last ones may never have begun."""
    stages = trainer.plan.stages if trainer.plan is not None else ()
    ran = stages[: len(trainer.stage_records)]
    if ran and len(ran) < len(stages):
        return max(stage.num_trainable for stage in ran)
    known = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    return known - sum(p.numel() for p in trainer.objective.named_parameters().values())


def base_of(config: Config, model: Any) -> str | None:
    """What the model was made from: of an adapter its backbone; nothing where the weights were random."""
    if is_adapted(model):
        return model.active_peft_config.base_model_name_or_path
    return None if config.model.from_scratch else config.model.model_name_or_path


def _backbone(config: Config, trainer: TransferTrainer) -> dict[str, Any] | None:
    """The identity of what the run started from (see `layers.identity`), without the digest of each tensor."""
    if trainer.backbone is None:
        return None
    kept = ("architecture", "configuration", "weights", "commit")
    return {name: trainer.backbone[name] for name in kept} | {"revision": config.model.model_revision}


def _cost(args: TransferArguments, hours: float) -> dict[str, float]:
    """Hours of all devices together, and dollars where their price is known."""
    return {"device_hours": hours} | ({} if args.usd_per_hour is None else {"usd": hours * args.usd_per_hour})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None
