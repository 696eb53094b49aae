"""The pass of a run's frozen model over its examples, which all that asks for features of layers shares.

The comparison of layers and the search for wrong labels read the same examples with the same weights: what one of them
has computed, the other finds in the run's store, by weights, preprocessing and content, also where the comparison led
to layers being left out above (`Prepared.code_below`). A head that is solved for has a pass of its own
(`training.probe_features`): it needs what the head's last layer reads, as training computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_transfer.features import FeatureStore, FrozenFeatures, frozen_features
from hf_transfer.features.keys import Unnoticed
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.runs.prepare import Prepared

LEAST_BATCH = 32  # examples of a forward pass without gradient, at least


def frozen_pass(
    prepared: Prepared,
    model: nn.Module,
    groups: Sequence[LayerGroup],
    dataset: Any,
    *,
    layers: Sequence[str] | None = None,
    poolings: Sequence[str] | None = None,
    store: FeatureStore | None = None,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
) -> FrozenFeatures:
    """Frozen features of examples as the model reads them; all processes must call it.

    Args:
        prepared: the run.
        model: of the run, on the device to compute on.
        groups: its layer groups.
        dataset: prepared examples.
        layers: as in `features.frozen_features`, like `poolings`, `autocast` and `num_workers`.
        poolings: likewise.
        store: kept by the caller; by default the run's own, as far as features can be kept at all.
        autocast: likewise.
        num_workers: likewise.

    Raises:
        UserError: they cannot be computed.
    """

    def computed(kept_in: FeatureStore | None, code: str | None = None) -> FrozenFeatures:
        return frozen_features(
            model,
            groups,
            dataset,
            collate=prepared.task.collator(prepared.processor),
            layers=layers,
            poolings=poolings,
            store=kept_in,
            code=code,
            batch_size=max(LEAST_BATCH, prepared.config.training.eval_batch_size),
            autocast=autocast,
            num_workers=num_workers,
        )

    with _as_trained(model):
        if store is not None or prepared.store is None:
            return computed(store)
        try:
            return computed(prepared.store, prepared.code_below)
        except Unnoticed:  # the model's own code, say, was typed at a prompt
            return computed(None)


@contextlib.contextmanager
def _as_trained(model: nn.Module) -> Iterator[None]:
    """Context in which a decoder keeps no cache, as from the moment that it has a trainer: a store's key names that."""
    config: Any = vars(model).get("config")
    before = None if config is None else vars(config).get("use_cache")
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
