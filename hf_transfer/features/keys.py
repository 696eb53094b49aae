"""What features depend on, so that no store returns stale ones: the model below a layer, preprocessing, content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_transfer.errors import UserError
from hf_transfer.features import digests
from hf_transfer.features.inputs import LABELS
from hf_transfer.features.object_digests import collator_digest
from hf_transfer.features.places import Places
from hf_transfer.layers.hashing import key

FORMAT = 1


def model_code(model: nn.Module) -> str:
    """Digest of a model's code, structure and configuration.

    Raises:
        UserError: a change of the code would go unnoticed.
    """
    code = digests.code_digest(model)
    if code is None:
        raise _unnoticed("the model's code")
    return code


def column_keys(
    model: nn.Module,
    code: str,
    collate: Callable[[list[Any]], Any],
    places: Places,
    cells: Sequence[tuple[str, str]],
    precision: str,
) -> dict[tuple[str, str], str]:
    """{(group, pooling): key of everything but the example}.

    A key changes with every parameter that the layer's output depends on, with every buffer, and with the code.

    Raises:
        UserError: a change of the collator would go unnoticed.
    """
    collator = collator_digest(collate)
    if collator is None:
        raise _unnoticed("the collator")
    buffers = [name for name, _ in model.named_buffers()]
    used = set().union(*(places.by_group[group].parameters for group, _ in cells))
    tensors = digests.tensor_digests(model, {*used, *buffers})
    shared = {
        "code": code,
        "collator": collator,
        "precision": f"{precision} {torch.get_float32_matmul_precision()}",
        "format": str(FORMAT),
    }
    keys = {}
    for group, pooling in cells:
        place = places.by_group[group]
        weights = key({name: tensors[name] for name in sorted({*place.parameters, *buffers})})
        keys[group, pooling] = key(
            shared | {"weights": weights, "place": repr((place.spot, place.layout)), "pooling": pooling}
        )
    return keys


def content_of_examples(dataset: Any) -> list[bytes]:
    """For each example 16 bytes of its content, its label left out.

    Raises:
        UserError: a change of an example would go unnoticed.
    """
    found = digests.example_digests(dataset, frozenset(LABELS))
    if found is None:
        raise _unnoticed("an example", "Use a dataset of tensors, arrays, texts or images, or use no store.")
    return found


class Unnoticed(UserError):
    """Features cannot be kept in a store, because a change of what they depend on would go unnoticed."""


def _unnoticed(what: str, fix: str = "Define it in a module, or use no store.") -> Unnoticed:
    return Unnoticed(f"A change of {what} would go unnoticed, so features cannot be kept in a store.", fix)
