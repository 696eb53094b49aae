"""Strategies: functions from the plan keys to stage specifications.

A strategy returns a list in the format that users write under `stages:`, for example
`[{"train": "head", "epochs": 1}, {"train": 4, "epochs": 2}, {"train": "all"}]`; the last stage takes the rest of
`num_train_epochs`. A new strategy is one function here and one line in `STRATEGIES`.

References: linear probing then fine-tuning (LP-FT), Kumar et al. 2022, section 3; gradual unfreezing and discriminative
learning rates (ULMFiT), Howard and Ruder 2018, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.config.fields import HEAD
from hf_transfer.errors import UserError, nearest

# LP-FT and fastai use a learning rate for the pretrained body that is 10 to 100 times lower than for the new head.
TWO_PHASE_HEAD_RATIO = 20.0

Spec = dict[str, Any]


def linear_probe(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """Feature extraction: only the head trains, the backbone is frozen."""
    return [{"train": HEAD}]


def partial(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """The head and the last `unfrozen_groups` groups."""
    return [{"train": keys.unfrozen_groups}]


def two_phase(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """The head alone, then everything (LP-FT).

    The backbone's learning rate is `learning_rate`; the head's is 20 times that unless a key sets layer-wise learning
    rates.
    """
    rate_keys = (keys.head_learning_rate, keys.layer_lr_decay, keys.layer_lr_multiplier, keys.layer_learning_rates)
    faster_head = all(k is None for k in rate_keys) and not keys.is_adapted  # an adapter is as new as the head
    rates = {"head_learning_rate": TWO_PHASE_HEAD_RATIO * keys.peak_learning_rate} if faster_head else {}
    head = [{"train": HEAD, "epochs": keys.head_epochs, **rates}] if keys.head_epochs > 0 else []
    return [*head, {"train": "all", **rates}]


def gradual(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """The head first, then `groups_per_unfreeze` more groups from the top at a time (ULMFiT).

    The next groups are unfrozen every `unfreeze_interval` epochs, or whenever the previous stage reaches a plateau.

    Raises:
        UserError: `unfreeze_until` is not a group below the head.
    """
    if keys.unfreeze_until is not None and keys.unfreeze_until not in backbone:
        raise UserError(
            f"unfreeze_until: there is no group {keys.unfreeze_until!r} below the head.",
            f"The groups are {', '.join(backbone)}.{nearest(keys.unfreeze_until, backbone)}",
        )
    deepest = backbone.index(keys.unfreeze_until) if keys.unfreeze_until is not None else 0
    most = len(backbone) - deepest
    counts = [*range(keys.groups_per_unfreeze, most, keys.groups_per_unfreeze), most]
    plateau = keys.unfreeze_trigger == "plateau"
    until = {"patience": keys.unfreeze_patience} if plateau else {"epochs": keys.unfreeze_interval}
    specs: list[Spec] = [{"train": HEAD, **until}, *({"train": k, **until} for k in counts)]
    specs[-1].pop("patience", None)  # nothing left to unfreeze
    return specs


def full(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """Everything, from the first step."""
    return [{"train": "all"}]


def auto(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """`two_phase`; with an adapter, which starts from the pretrained function, `full`."""
    return full(keys, backbone) if keys.is_adapted else two_phase(keys, backbone)


Strategy = Callable[[PlanArguments, Sequence[str]], list[Spec]]
STRATEGIES: dict[str, Strategy] = {
    "auto": auto,
    "linear-probe": linear_probe,
    "partial": partial,
    "two-phase": two_phase,
    "gradual": gradual,
    "full": full,
    "lora": full,  # `with_adapter` adds the adapter
    "scratch": full,  # the same plan; `train` and `fine_tune` initialize the weights randomly
}
