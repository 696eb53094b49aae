"""What the frozen part of a model computes: recorded once, and replayed by stand-ins.

There is no code per architecture: `trace.find_cut` finds out where a model can be entered. In a replay the `forward` of
the frozen modules is replaced. Recorded outputs come from the record, outputs that nothing trainable depends on are
placeholders of the right shape, and everything else (masks, pooling, the head) runs as written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.features.batches import Batch
from hf_transfer.features.cut import CallKey, Cut, Leaf, Refused
from hf_transfer.features.stand_ins import patched


class _AllRecorded(BaseException):
    """Ends a forward pass early: everything that is recorded has been computed."""


def record(model: nn.Module, cuts: Sequence[Cut], batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Record the outputs at several cuts in one forward pass, which ends with the last of them.

    If one cut is deeper than another, its modules run as part of the other's.

    Args:
        model: in eval mode.
        cuts: where it is entered.
        batch: on the model's device.

    Returns:
        For each cut {name: (examples, [positions,] *shape)}.

    Raises:
        Refused: the model did not call a recorded module for this batch.
    """
    wanted: dict[CallKey, list[tuple[int, str, int, Leaf]]] = {}
    for n, cut in enumerate(cuts):
        for name, (key, i, leaf) in cut.stored.items():
            wanted.setdefault(key, []).append((n, name, i, leaf))
    recorded: list[dict[str, torch.Tensor]] = [{} for _ in cuts]

    def keep(place: tuple[CallKey, bool], leaves: list[Any]) -> None:
        for n, name, i, leaf in wanted[place[0]]:
            recorded[n][name] = leaf.rows(leaves[i].detach()).clone()

    observe(model, [(key, False) for key in wanted], batch, keep)
    return recorded


def observe(
    model: nn.Module,
    places: Sequence[tuple[CallKey, bool]],
    batch: Batch,
    see: Callable[[tuple[CallKey, bool], list[Any]], None],
) -> None:
    """Look at inputs and outputs of modules in one forward pass without gradient, which ends with the last of them.

    Args:
        model: in eval mode.
        places: (a call, whether its input is meant or its output).
        batch: on the model's device.
        see: is called with a place and the leaves of the input or output, as soon as they are there: the model may
            write into them later.

    Raises:
        Refused: the model did not call one of the modules for this batch.
    """
    missing = set(places)

    def look(place: tuple[CallKey, bool], values: Any) -> None:
        if place in missing:
            see(place, pytree.tree_leaves(values))
            missing.discard(place)
            if not missing:
                raise _AllRecorded

    def answer(key: CallKey, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        look((key, True), (args, kwargs))
        output = own_forward(*args, **kwargs)
        look((key, False), output)
        return output

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    names = list(dict.fromkeys(name for (name, _), _ in places))
    with torch.no_grad(), patched(model, names, answer), contextlib.suppress(_AllRecorded):
        model(**inputs)
    if missing:
        raise Refused(f"{next(iter(missing))[0][0]} was not called for a batch")


@contextlib.contextmanager
def replaying(
    model: nn.Module, cut: Cut, rows: Mapping[str, torch.Tensor], count: int, length: int, device: torch.device
) -> Iterator[None]:
    """Within the context, the frozen part of `model` returns what was recorded.

    Args:
        model: is entered at `cut`.
        cut: where.
        rows: what `record` returned for the examples of the batch, padded alike.
        count: number of examples.
        length: token positions of the batch.
        device: of the model.
    """
    outputs: dict[CallKey, list[Any]] = {}
    for key, call in cut.calls.items():
        leaves = []
        for i, leaf in enumerate(call.leaves):
            if not isinstance(leaf, Leaf):
                leaves.append(leaf)
            elif leaf.stored:
                leaves.append(leaf.output(rows[f"{key[0]}#{key[1]}/{i}"], count, length))
            elif leaf.constant is not None:
                leaves.append(leaf.constant)
            else:
                leaves.append(leaf.placeholder(count, length, device, cut.allocates))
        outputs[key] = leaves

    def answer(key: CallKey, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if key not in outputs:
            return own_forward(*args, **kwargs)
        return pytree.tree_unflatten(outputs[key], cut.calls[key].spec)

    with patched(model, list(dict.fromkeys(name for name, _ in cut.calls)), answer):
        yield
