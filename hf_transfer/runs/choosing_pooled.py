"""A head on a pooled layer where the architecture does not offer it: image models, other text models, and `max`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hf_transfer.data.augment import EXAMPLE
from hf_transfer.errors import UserError, nearest
from hf_transfer.features import FrozenFeatures
from hf_transfer.features.batches import Batch
from hf_transfer.features.frozen import places_of
from hf_transfer.features.layouts import CLS, HEAD_INPUT, MEAN
from hf_transfer.features.places import Places
from hf_transfer.features.pooled_layer import PooledChange, head_refusal, read_pooled, reads
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.models.heads import MLPSpec
from hf_transfer.models.pooled_head import PooledLinear, PoolingSpec
from hf_transfer.models.timm_pooling import set_timm_pooling
from hf_transfer.runs.decisions import with_decisions
from hf_transfer.runs.frozen_pass import frozen_pass
from hf_transfer.runs.prepare import Prepared
from hf_transfer.runs.solvable import groups_of, has_adapter, keeps_head

LAST, AVERAGE = "last", "average"  # values of `pooling_layer` besides names
OWN = (HEAD, HEAD_INPUT)  # cell of the features: what the head reads as the model is made
MARGIN = 2.0  # standard errors by which a head that plain transformers cannot load must be better


class Layers(NamedTuple):
    """Where the outputs of a model's layers are."""

    groups: tuple[LayerGroup, ...]
    places: Places
    batch: Batch


def refusal(prepared: Prepared) -> str:
    """Why a model's head cannot read a pooled layer, whichever, as part of a sentence; empty if nothing shows."""
    config = prepared.loaded.model.config
    if MLPSpec.of(config) is not None:
        return "its head is an MLP"
    if PoolingSpec.of(config) is not None:
        return "an earlier run changed what its head reads"
    return ""


def examples(prepared: Prepared) -> tuple[Any, Any]:
    """(the training examples as model inputs, their collator)."""
    train, task = prepared.data.train, prepared.task
    own = train.remove_columns([column for column in (EXAMPLE,) if column in train.column_names])
    rows = task.prepare(own, prepared.inputs, prepared.processor, prepared.config.data)
    return rows, task.collator(prepared.processor)


def layers_of(prepared: Prepared) -> Layers:
    """Where the outputs of the model's layers are.

    Raises:
        UserError: the model cannot be run on the examples.
    """
    model, groups = prepared.loaded.model.to(prepared.config.training.device), groups_of(prepared)
    return Layers(groups, *places_of(model, groups, *examples(prepared)))


def candidates(prepared: Prepared, pooling: str, only: str | None) -> tuple[list[tuple[str, str]], str]:
    """((group, pooling) to compare, the last layer first; why there are none).

    Of convolutional layers in a row with as many channels, the last one is compared. The stem is only read by name:
    its class token is the same for all examples.

    Args:
        prepared: the run.
        pooling: `auto` for the class token and the mean, or the only one.
        only: the only layer; None for all.

    Raises:
        UserError: the model cannot be run on the examples, or there is no such layer.
    """
    layers = layers_of(prepared)
    if reason := head_refusal(prepared.loaded.model, layers.groups):
        return [], reason
    names = [name_of(layers.groups, only)] if only else _comparable(layers)
    wanted = (CLS, MEAN) if pooling == "auto" else (pooling,)
    found = [
        (name, one)
        for name in reversed(names)
        if name in layers.places.by_group
        for one in layers.places.poolings(name)
        if one in wanted
    ]
    return found, "" if found else f"no layer has a {pooling} token"


def _comparable(layers: Layers) -> list[str]:
    """Names of the groups above the stem, of convolutional ones in a row with as many channels the last."""
    have = [group.name for group in layers.groups[1:-1] if group.name in layers.places.by_group]
    counts = [layers.places.channels(name) for name in have]
    return [n for n, one, after in zip(have, counts, [*counts[1:], None], strict=True) if not one or one != after]


def averaged(layers: Layers, pooling: str) -> list[str]:
    """Names of the groups on whose pooled outputs heads are averaged: the upper half of those that can be compared.

    Raises:
        UserError: there are fewer than two.
    """
    names = [name for name in _comparable(layers) if pooling in layers.places.poolings(name)]
    names = names[(len(names) - 1) // 2 :]
    if len(names) > 1 and names[-1] == layers.groups[-2].name:
        return names
    reason = layers.places.refused.get(layers.groups[-2].name) or f"fewer than two layers have a {pooling}"
    raise UserError(
        f"average cannot be had with this model: {reason}.", "Name one layer, or leave it out.", key="pooling_layer"
    )


def can_average(prepared: Prepared, pooling: str) -> bool:
    """Whether a head can read several layers, by trying."""
    if refusal(prepared):
        return False
    try:
        layers = layers_of(prepared)
        with torch.random.fork_rng(devices=[]):
            read_pooled(prepared.loaded.model, *layers, averaged(layers, pooling), pooling, tries=True)
    except UserError:
        return False
    return True


def acceptable(prepared: Prepared) -> Callable[[str, str], bool]:
    """Whether the model can be made to read (a group, a pooling), by trying."""
    layers = layers_of(prepared)

    def accept(name: str, pooling: str) -> bool:
        try:
            with torch.random.fork_rng(devices=[]):
                read_pooled(prepared.loaded.model, *layers, name, pooling, tries=True)
        except UserError:
            return False
        return True

    return accept


def features(prepared: Prepared, layers: list[str] | None, poolings: tuple[str, ...] | None = None) -> FrozenFeatures:
    """Features of the training examples.

    Args:
        prepared: the run.
        layers: names of the groups; None for all that have features.
        poolings: None for all that they have.

    Raises:
        UserError: the model cannot be run on the examples.
    """
    return frozen_pass(
        prepared,
        prepared.loaded.model.to(prepared.config.training.device),
        groups_of(prepared),
        examples(prepared)[0],
        layers=layers,
        poolings=poolings,
    )


def name_of(groups: tuple[LayerGroup, ...], wanted: str | None) -> str:
    """The layer group that `pooling_layer` names; the last one below the head by default.

    Raises:
        UserError: there is no such group.
    """
    names = [group.name for group in groups[:-1]]
    if wanted == AVERAGE:  # the upper half, of which this is the top
        wanted = LAST
    if wanted in (None, "auto", LAST):
        return names[-1]
    if wanted not in names:
        raise UserError(
            f"there is no layer group {wanted!r} below the head.",
            f"Use last, auto, average, or one of {', '.join(names)}.{nearest(str(wanted), [*names, AVERAGE])}",
            key="pooling_layer",
        )
    return str(wanted)


def read(prepared: Prepared, is_resumed: bool) -> tuple[Prepared, PooledChange | None]:
    """(the run with a head on the layer that its keys name, what was changed; None if the head reads it anyway).

    Raises:
        UserError: the model cannot do it.
    """
    model, keys = prepared.loaded.model, prepared.config.model
    layers, pooling = layers_of(prepared), str(keys.pooling)
    name = name_of(layers.groups, keys.pooling_layer)
    averages = keys.pooling_layer == AVERAGE
    wanted = averaged(layers, pooling) if averages else [name]
    if not averages and reads(model, layers.places, layers.batch, name, pooling):
        return prepared, None
    reason = refusal(prepared)
    if has_adapter(prepared):
        reason = "an adapter is saved without the backbone, whose layers pooling changes"
    elif keeps_head(prepared):
        reason = "the checkpoint's head was trained on what it reads now"
    if reason:
        raise UserError(f"{pooling} cannot be had with this model: {reason}.", "Leave pooling out.", key="pooling")
    if not averages and name == layers.groups[-2].name and set_timm_pooling(model, pooling):
        if reads(model, *places_of(model, groups_of(prepared), *examples(prepared)), name, pooling):
            return prepared, PooledChange(type(model).__name__, pooling, name, (), True, 0.0)
        raise UserError(
            f"{pooling} cannot be had with this model: timm pools {name} otherwise.",
            "Leave pooling out.",
            key="pooling",
        )
    with torch.random.fork_rng(devices=[]):  # says what is wrong before the features are computed
        read_pooled(model, *layers, wanted if averages else name, pooling, tries=True)
    found = None if is_resumed else features(prepared, wanted, (pooling,))
    change = read_pooled(model, *layers, wanted if averages else name, pooling)
    last = next(module for module in model.modules() if isinstance(module, PooledLinear))
    if found is not None:  # else the checkpoint holds them
        states = torch.cat([found.matrix(one, pooling) for one in wanted], 1)
        last.standardize(states.to(last.mean.device))
    return _with_head(prepared), change


def _with_head(prepared: Prepared) -> Prepared:
    """The run with the names of its new parameters, without those that are gone."""
    model, rules = prepared.loaded.model, prepared.config.training.layer_rules or []
    spec = PoolingSpec.of(model.config)
    assert spec is not None
    names = [name for name, _ in model.named_parameters()]
    own = [name for name in names if name.startswith(f"{spec.head}.output.")]
    fresh = sorted({*(name for name in prepared.loaded.fresh if name in names), *own})
    loaded = replace(prepared.loaded, fresh=tuple(fresh))
    kept = [rule for rule in rules if any(re.search(rule[0], name) for name in names)]
    kept += [rule for rule in loaded.layer_rules if rule not in kept]
    return replace(prepared, loaded=loaded, config=with_decisions(prepared.config, {"layer_rules": kept or None}))
