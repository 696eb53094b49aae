"""How far apart source and target are in the features of a run's model, before and after training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_transfer.analysis.domain_distance import FEWEST, Distance, distance, plane
from hf_transfer.config.arguments.adaptation import aligns_frozen
from hf_transfer.data.augment import EXAMPLE
from hf_transfer.errors import UserError, WorkFailed, one_line
from hf_transfer.features.layouts import MEAN
from hf_transfer.files import say, write_bytes
from hf_transfer.layers.architectures import HEAD
from hf_transfer.objectives.adaptation.distance_in_words import before_in_words
from hf_transfer.report.domain_plot import draw
from hf_transfer.run_folder import DOMAINS_PNG
from hf_transfer.runs.frozen_pass import frozen_pass
from hf_transfer.runs.prepare import Prepared
from hf_transfer.training import linear_probe
from hf_transfer.training.adapting import in_words, place_of
from hf_transfer.training.probe_features import unlabeled_features
from hf_transfer.training.trainer import TransferTrainer

KEY = "domain_adaptation"  # section of results.json
MOST = 500  # examples of each domain

Features = tuple[torch.Tensor, torch.Tensor]  # of the source and of the target, (examples, width)


@dataclass
class Domains:
    """Source and target as a model sees them; without augmentation, as many examples of each.

    Attributes:
        prepared: the run.
        trainer: that holds the model.
        layer: layer group whose features are compared.
        reason: why nothing was measured, as part of a sentence; empty if it was.
        samples: prepared examples of the source and of the target.
        features: before training.
        first: their distance.
    """

    prepared: Prepared
    trainer: TransferTrainer
    layer: str = HEAD
    reason: str = ""
    samples: tuple[Dataset, Dataset] | None = None
    features: Features | None = None
    first: Distance | None = None

    def look(self) -> Features:
        """The features with the model as it is; called by all processes.

        Raises:
            UserError: they cannot be computed.
            WorkFailed: one of them is NaN or infinite.
        """
        assert self.samples is not None
        trainer, layer = self.trainer, self.layer
        if aligns_frozen(trainer.args):
            last = linear_probe.find_head(trainer)
            own, other = (unlabeled_features(trainer, last, sample) for sample in self.samples)
            return own, other
        pooling = None if layer == HEAD else MEAN
        source, target = (
            frozen_pass(
                self.prepared,
                trainer.model,
                trainer.layer_groups,
                sample,
                layers=[layer],
                poolings=None if pooling is None else [pooling],
                autocast=torch.bfloat16 if trainer.args.bf16 else None,
            ).matrix(layer, pooling)
            for sample in self.samples
        )
        return source, target

    def to_dict(self) -> dict[str, Any]:
        """What is known before training."""
        if self.first is None:
            return {"skipped": self.reason}
        assert self.features is not None
        return {"layer": in_words(self.layer), "examples": len(self.features[0]), "before": self.first.to_dict()}

    def finish(self, folder: Path) -> dict[str, Any]:
        """What `results.json` says after training; called by all processes, draws the picture."""
        found = self.to_dict()
        if self.features is None:
            return found
        aligned = self.trainer.alignment
        try:
            source, target = self.look()
            last = source if aligned is None else aligned(source), target
        except (UserError, WorkFailed) as error:
            return {**found, "skipped": one_line(error)}
        if self.trainer.is_world_process_zero():
            titles = ("before training", "after training" if aligned is None else "the source aligned")
            planes = {title: plane(*one) for title, one in zip(titles, (self.features, last), strict=True)}
            picture = draw({n: (p.source.numpy(), p.target.numpy(), p.shares) for n, p in planes.items()})
            write_bytes(folder / DOMAINS_PNG, picture)
        return {**found, "after": distance(*last, self.trainer.args.seed).to_dict(), "aligned": aligned is not None}


def domains_of(prepared: Prepared, trainer: TransferTrainer, talks: bool) -> Domains | None:
    """Look at both domains before training; None without a target. Called by all processes.

    Args:
        prepared: the run.
        trainer: made for it, before its first step.
        talks: whether the distance is printed.
    """
    if prepared.target is None:
        return None
    domains = _seen(prepared, prepared.target.examples, trainer)
    if talks and trainer.is_world_process_zero():
        say(before_in_words(domains.to_dict()))
    return domains


def _seen(prepared: Prepared, target: Dataset, trainer: TransferTrainer) -> Domains:
    source = prepared.data.train
    count = min(len(source), len(target), MOST)
    if count < FEWEST:
        return Domains(prepared, trainer, reason=f"one of the domains has fewer than {FEWEST} examples")
    draws, seed = np.random.default_rng(trainer.args.seed), trainer.args.seed
    samples = tuple(_prepared(prepared, one, draws.permutation(len(one))[:count]) for one in (source, target))
    domains = Domains(prepared, trainer, _layer(trainer), samples=(samples[0], samples[1]))
    try:
        domains.features = domains.look()
    except (UserError, WorkFailed) as error:
        domains.reason = one_line(error).rstrip(".")
        return domains
    domains.first = distance(*domains.features, seed)
    return domains


def _layer(trainer: TransferTrainer) -> str:
    """The aligned layer group; of a run that aligns none, the one that it would be."""
    if trainer.aligned is not None or aligns_frozen(trainer.args):
        return trainer.aligned_layer
    try:
        return place_of(trainer)[0]
    except UserError:
        return HEAD  # the reason is found again where its features are asked for


def _prepared(prepared: Prepared, examples: Dataset, rows: Any) -> Dataset:
    """Some examples as the model takes them, not augmented."""
    own = examples.select(sorted(rows.tolist()))
    own = own.remove_columns([column for column in (EXAMPLE,) if column in own.column_names])
    return prepared.task.prepare(own, prepared.inputs, prepared.processor, prepared.config.data)
