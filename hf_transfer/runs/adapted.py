"""What `results.json` says of domain adaptation: what was done, and what can be said of it without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from hf_transfer.analysis.validators import (
    Scores,
    deep_embedded,
    density_ratio,
    entropy,
    information,
    neighborhood_density,
)
from hf_transfer.config.arguments.adaptation import PENALTIES, aligns_frozen
from hf_transfer.data.labels import LABELS, SINGLE_LABEL
from hf_transfer.errors import UserError, WorkFailed
from hf_transfer.layers.architectures import HEAD
from hf_transfer.runs.domains import Domains
from hf_transfer.runs.expecting import inputs_of
from hf_transfer.runs.frozen_pass import frozen_pass
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.target import spread
from hf_transfer.training.answers import answers
from hf_transfer.training.trainer import TransferTrainer

MOST = 1000  # examples of each kind that the validators read


def adapted(
    prepared: Prepared,
    trainer: TransferTrainer,
    validation: Any,
    selection: Mapping[str, Any] | None,
    domains: Domains | None,
) -> dict[str, Any] | None:
    """The section `domain_adaptation`; None without a target. All processes must call it.

    Args:
        prepared: the run.
        trainer: that has trained.
        validation: prepared examples of the source's validation split.
        selection: what the run was chosen from, if it was.
        domains: source and target before training.
    """
    if prepared.target is None:
        return None
    args, names = prepared.config.training, prepared.loaded.labels.names
    method = args.domain_adaptation
    scores = scores_of(prepared, trainer, validation)
    found: dict[str, Any] = {
        "method": method,
        "target": {
            "name": prepared.config.data.target_dataset_name,
            "examples": len(prepared.target.examples),
            "labeled": prepared.target.count,
        },
        "validators": scores.to_dict() if scores else None,
        "selection": selection,
    }
    if aligns_frozen(args):
        found |= {"frozen": True}
    elif method in PENALTIES:
        found |= {
            "weight": args.domain_adaptation_weight,
            "schedule": args.domain_adaptation_schedule,
            "layer": trainer.aligned_layer,
            "penalty": last_mean(trainer.state.log_history, f"penalty/{method}"),
        }
    if trainer.self_training is not None:
        found |= {"threshold": trainer.self_training.threshold, "rounds": _rounds(trainer, names)}
    if domains is not None:
        found["distance"] = domains.finish(Path(str(args.output_dir)))
    return found


def last_mean(logs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a logged value over the last epoch in which it was logged; None if it never was."""
    values = [(log["epoch"], log[name]) for log in logs if name in log]
    last = [value for epoch, value in values if epoch > values[-1][0] - 1]
    return sum(last) / len(last) if last else None


def _rounds(trainer: TransferTrainer, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rounds of self-training, with what is said by class under its name."""
    by_class = ("labeled", "answered", "threshold")
    return [
        {n: dict(zip(names, v, strict=True)) if n in by_class else v for n, v in one.to_dict().items()}
        for one in trainer.self_training.rounds
    ]


def scores_of(prepared: Prepared, trainer: TransferTrainer, validation: Any) -> Scores | None:
    """What the validators say of the trained model; None where examples have not one class each."""
    if prepared.loaded.labels.problem_type != SINGLE_LABEL or prepared.target is None:
        return None
    target = prepared.target.unseen().plain(prepared.task, prepared.processor, prepared.config.data, MOST)
    rows = spread(len(validation), MOST)
    held_out, truth = validation.select(rows), np.asarray(prepared.data.splits["validation"][LABELS])[rows]
    of_target, of_source = answers(trainer, target), answers(trainer, held_out)
    losses = -log_softmax(of_source.astype(np.float64), axis=1)[np.arange(len(truth)), truth]
    right = of_source.argmax(1) == truth
    weights = _weights(prepared, trainer, target, held_out)
    return Scores(
        information=information(of_target),
        entropy=entropy(of_target),
        deep_embedded=None if weights is None else deep_embedded(losses, weights),
        neighborhood_density=neighborhood_density(of_target),
        source_accuracy=float(right.mean()),
        source_error=float(np.sqrt(right.mean() * (1 - right.mean()) / len(right))),
    )


def _weights(prepared: Prepared, trainer: TransferTrainer, target: Any, held_out: Any) -> Any:
    """How much each validation example looks like one of the target; None where features cannot be read."""
    train = inputs_of(prepared, spread(len(prepared.data.train), MOST))
    try:
        source, other, validation = (
            frozen_pass(prepared, trainer.model, trainer.layer_groups, examples, layers=[HEAD]).matrix(HEAD).numpy()
            for examples in (train, target, held_out)
        )
    except (UserError, WorkFailed):
        return None
    return density_ratio(source, other, validation)
