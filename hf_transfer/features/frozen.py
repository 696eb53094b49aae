"""What a frozen model says about examples, layer by layer: computed once, pooled, and kept by content."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_transfer.errors import UserError, WorkFailed, nearest
from hf_transfer.features.batches import Batch
from hf_transfer.features.columns import Column, FeatureStore
from hf_transfer.features.cut import Refused
from hf_transfer.features.examples import batches_by_length
from hf_transfer.features.inputs import Reader, labels_of
from hf_transfer.features.keys import column_keys, content_of_examples, model_code
from hf_transfer.features.layouts import HEAD_INPUT, POOLINGS
from hf_transfer.features.passes import run_pass, text_lengths
from hf_transfer.features.places import Places, find_places
from hf_transfer.features.pooling import Cell, depending_on_padding, pooled_outputs
from hf_transfer.features.ranks import Ranks
from hf_transfer.features.store_files import NoRoom
from hf_transfer.layers.architectures import HEAD
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.layers.side_effects import untouched

LAST = "last"
_TRIED = 8  # examples that the model is tried with


@dataclass(frozen=True)
class FrozenFeatures:
    """The pooled outputs of a model's layer groups for the examples of a dataset.

    Attributes:
        groups: names of the layer groups, input to head, whose outputs are here. The last one is `head` if the input of
            the classifier head is among them.
        poolings: `cls`, `mean` and `max`, as far as they are here.
        labels: of the examples, in the dataset's order: a tensor, or a list where they are no numbers; None if there
            are none.
        refused: {group: why its output cannot be pooled, as part of a sentence}.
        computed: number of examples that went through the model; the others were in the store.
        code: digest of the model's code and structure; empty without a store.
    """

    groups: tuple[str, ...]
    poolings: tuple[str, ...]
    labels: Any
    refused: Mapping[str, str]
    computed: int
    code: str
    _columns: Mapping[Cell, Column]
    _digests: Sequence[bytes]
    _widths: Mapping[str, int]

    def __len__(self) -> int:
        return len(self._digests)

    def width(self, group: str) -> int:
        """Number of features of a layer group."""
        return self._widths[self._named(group)]

    def matrix(self, group: str, pooling: str | None = None) -> torch.Tensor:
        """(examples, width) in fp32, in the dataset's order.

        Args:
            group: a name from `groups`, or `last` for the last group before the head.
            pooling: a name from `poolings`; None for `head`, whose input is one vector.

        Raises:
            UserError: the output of this group is not here, or not pooled like this.
        """
        name = self._named(group)
        own = [have for of_group, have in self._columns if of_group == name]
        wanted = HEAD_INPUT if pooling is None and name == HEAD else pooling
        if wanted not in own:
            kinds = "none: the input of the head is one vector" if own == [HEAD_INPUT] else ", ".join(own)
            raise UserError(f"pooling: {name} has no features pooled by {pooling!r}.", f"Use {kinds}.")
        return self._columns[name, wanted].get(self._digests)

    def _named(self, group: str) -> str:
        if group == LAST and LAST not in self.groups:
            backbone = [name for name in self.groups if name != HEAD]
            group = backbone[-1] if backbone else group
        if group in self.groups:
            return group
        if group in self.refused:
            raise UserError(f"There are no features of {group}: {self.refused[group]}.", "Use another layer group.")
        raise UserError(
            f"There are no features of {group!r}.",
            f"Use one of {', '.join(self.groups)}.{nearest(group, list(self.groups))}",
        )


def frozen_features(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    dataset: Any,
    *,
    collate: Callable[[list[Any]], Any],
    layers: Sequence[str] | None = None,
    poolings: Sequence[str] | None = None,
    store: FeatureStore | None = None,
    code: str | None = None,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
) -> FrozenFeatures:
    """The pooled outputs of a model's layer groups for every example of a dataset, in one pass.

    The model is in eval mode and without gradient, and afterwards as it was, bit for bit: modes, `requires_grad`,
    buffers, and the random number generators. Examples with the same content are computed once, and examples that are
    in `store` not at all; texts of like length share a batch, and ranks (`torch.distributed`) share the pass.

    Where the output of a layer group is, and which of its axes holds the features, is found by experiment
    (`features.places`). It is the last output of the group's modules that has positions: that of the block, or of the
    final norm, which belongs to the last group. The poolings are

    - `cls`: the first token, where the model has a class token: an image model whose first position begins as a learned
      vector, or a text model that reads only the first token, or whose texts begin with a token of their own that reads
      the others;
    - `mean` and `max`: over the tokens of a text without its padding, special tokens included; over the pixels or
      patches of an image, without class and register tokens.

    `head` is the input of the classifier head's first layer: one vector per example, without pooling.

    Args:
        model: on the device to compute on.
        groups: of `layer_groups(model)`.
        dataset: map-style; columns that the model does not take are left out.
        collate: makes a batch from a list of examples, with an `attention_mask` if it pads texts.
        layers: names of the groups to compute, `last` for the last one before the head; by default all whose output can
            be pooled.
        poolings: by default all that the model has.
        store: keeps the features between calls.
        code: `FrozenFeatures.code` of the model before its upper layers were changed, if it is certain that those below
            compute what they did: their features are found in the store if their weights and places are the same.
        batch_size: examples per batch and rank.
        autocast: dtype of the forward passes; by default that of the weights.
        num_workers: processes that load batches.

    Raises:
        UserError: the dataset is a stream, is empty or lacks the model's inputs; a group or pooling is unknown or
            cannot be computed; this process has only a part of the weights; with a store, a change of the examples, the
            collator or the model's code would go unnoticed, or there is not enough room.
        WorkFailed: a feature is NaN or infinite.
    """
    reader, ranks = Reader.of(model, dataset, collate), Ranks.current()
    casts = partial(_casting, reader.device.type, autocast)
    lengths = text_lengths(reader.dataset)
    with untouched(model), casts():
        model.eval()
        reader.check_fixed()
        places = _places(model, groups, reader, lengths)
        cells = _cells(places, groups, layers, poolings)
        pads = lengths is not None and batch_size > 1
        if pads and (bad := depending_on_padding(model, places, cells, reader, lengths or ())):
            left = {name: place for name, place in places.by_group.items() if name not in bad}
            places = replace(places, by_group=left, refused={**places.refused, **bad})
            cells = _cells(places, groups, layers, poolings)
    if store is None:
        keys = {cell: "-".join(cell) for cell in cells}
        digests = [number.to_bytes(16, "big") for number in range(len(dataset))]
    else:
        code = code or model_code(model)
        keys = column_keys(model, code, collate, places, cells, f"{autocast} {reader.device.type}")
        digests = content_of_examples(reader.dataset)
    widths = {group: places.by_group[group].layout.width for group, _ in cells}
    store = FeatureStore() if store is None else store
    on_disk = store.folder is not None
    columns = _open(store, keys, widths, digests, ranks)
    try:
        run = partial(run_pass, autocast=casts(), num_workers=num_workers, shows_progress=ranks.rank == 0)
        computed, seen = _compute(model, places, columns, digests, reader, lengths, batch_size, ranks, on_disk, run)
    except BaseException:
        for column in columns.values():
            column.close()
        raise
    found = [pooling for pooling in POOLINGS if any(of_cell == pooling for _, of_cell in cells)]
    labels = labels_of(dataset, seen, ranks)
    return FrozenFeatures(
        tuple(widths), tuple(found), labels, places.refused, computed, code or "", columns, digests, widths
    )


def _casting(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if dtype is None else torch.autocast(device, dtype)


def _places(model: nn.Module, groups: Sequence[LayerGroup], reader: Reader, lengths: list[int] | None) -> Places:
    """Where the outputs of the groups are, tried with some of the examples."""
    try:
        return find_places(model, groups, reader.batch(_tried(reader, lengths)))
    except Refused as error:
        raise UserError(f"The features of this model cannot be computed: {error}.") from error


def _tried(reader: Reader, lengths: list[int] | None) -> list[int]:
    """Numbers of the examples that places are tried with."""
    count = len(reader.dataset)
    tried = [i * count // min(count, _TRIED) for i in range(min(count, _TRIED))]
    if lengths is not None:  # some padding shows what padding looks like
        tried += [max(range(count), key=lengths.__getitem__), min(range(count), key=lengths.__getitem__)]
    return tried


def places_of(
    model: nn.Module, groups: Sequence[LayerGroup], dataset: Any, collate: Callable[[list[Any]], Any]
) -> tuple[Places, Batch]:
    """(where the outputs of a model's layer groups are, a few examples as a batch); see `frozen_features`.

    Raises:
        UserError: the dataset is a stream, is empty or lacks the model's inputs; the model computes different things
            for batches of different sizes.
    """
    reader = Reader.of(model, dataset, collate)
    lengths = text_lengths(reader.dataset)
    with untouched(model):
        model.eval()
        return _places(model, groups, reader, lengths), {
            name: value for name, value in reader.batch(_tried(reader, lengths)).items() if name != "labels"
        }


def _cells(
    places: Places, groups: Sequence[LayerGroup], layers: Sequence[str] | None, poolings: Sequence[str] | None
) -> list[Cell]:
    """What is computed: (group, pooling), the groups in order."""
    for pooling in poolings or ():
        if pooling not in POOLINGS:
            raise UserError(f"poolings: unknown pooling {pooling!r}.", f"Use {', '.join(POOLINGS)}.")
    names = [group.name for group in groups]
    backbone = [name for name in names if name != HEAD]
    wanted = list(places.by_group)
    if layers is not None:
        wanted = [backbone[-1] if name == LAST and LAST not in names else name for name in layers]
        for name in wanted:
            if name not in names:
                raise UserError(
                    f"layers: unknown layer group {name!r}.", f"Use {', '.join(names)}.{nearest(name, names)}"
                )
            if name in places.refused:
                raise UserError(f"layers: {name} has no features: {places.refused[name]}.", "Use another layer group.")
    if not wanted:
        name, reason = next(iter(places.refused.items()))
        raise UserError(f"No layer group of this model has features. {name}: {reason}.")
    cells = []
    for name in sorted(set(wanted), key=names.index):
        have = places.poolings(name)
        chosen = have if poolings is None or name == HEAD else tuple(poolings)
        if missing := [pooling for pooling in chosen if pooling not in have]:
            raise UserError(f"poolings: {name} has no class token for {missing[0]!r}.", f"Use {', '.join(have)}.")
        cells += [(name, pooling) for pooling in chosen]
    return cells


def _open(
    store: FeatureStore,
    keys: Mapping[Cell, str],
    widths: Mapping[str, int],
    digests: Sequence[bytes],
    ranks: Ranks,
) -> dict[Cell, Column]:
    """The columns of the store.

    Raises:
        UserError: they do not fit.
    """
    columns: dict[Cell, Column] = {}
    unique = list(dict.fromkeys(digests))
    try:
        for cell, key in keys.items():
            columns[cell] = Column(store, key, widths[cell[0]], unique, ranks)
    except NoRoom as error:
        for column in columns.values():
            column.close()
        raise UserError(
            f"There is no room for the features: {error}.",
            "Ask for fewer layers or poolings, or use another store: FeatureStore(folder, budget), on disk and in GB.",
        ) from error
    return columns


def _compute(
    model: nn.Module,
    places: Places,
    columns: Mapping[Cell, Column],
    digests: Sequence[bytes],
    reader: Reader,
    lengths: list[int] | None,
    batch_size: int,
    ranks: Ranks,
    on_disk: bool,
    run: Callable[..., None],
) -> tuple[int, list[tuple[list[int], torch.Tensor]]]:
    """Fill the columns; (number of examples computed, their labels as far as this rank saw them).

    Raises:
        WorkFailed: a feature is NaN or infinite.
    """
    first = {digest: number for number, digest in reversed(list(enumerate(digests)))}
    missing = set[bytes]().union(*(column.todo for column in columns.values()))
    todo = sorted(first[digest] for digest in missing)
    by_length = batches_by_length(len(todo), None if lengths is None else [lengths[n] for n in todo], batch_size)
    batches = ranks.share([[todo[i] for i in batch] for batch in by_length], on_disk)
    cells, seen, broken = list(columns), list[tuple[list[int], torch.Tensor]](), list[int]()

    def visit(numbers: list[int], batch: Batch) -> None:
        found = pooled_outputs(model, places, cells, batch)
        finite = torch.stack([vectors.isfinite().all(-1) for vectors in found.values()]).all(0).tolist()
        kept = [i for i, is_finite in enumerate(finite) if is_finite]
        broken.extend(number for number, is_finite in zip(numbers, finite, strict=True) if not is_finite)
        for cell, vectors in found.items():
            columns[cell].put([digests[numbers[i]] for i in kept], vectors[kept])
        if torch.is_tensor(batch.get("labels")):
            seen.append((numbers, batch["labels"].cpu()))

    run(model, reader.dataset, reader.collate, batches, visit, prepare=reader.prepared)
    if all_broken := sorted({number for own in ranks.gather(broken) for number in own}):
        raise WorkFailed(
            f"The frozen model's features are NaN or infinite for {len(all_broken):,} examples, the first of them "
            f"number {all_broken[0]}.",
            "Check those examples, or use a higher precision.",
        )
    for column in columns.values():
        column.finish(reader.device)
    return len(todo), seen
