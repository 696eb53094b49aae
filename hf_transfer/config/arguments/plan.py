"""Keys that a Plan is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_transfer.config.arguments.adapter import AdapterArguments
from hf_transfer.config.fields import key

TRIGGERS = ("interval", "plateau")


@dataclass
class PlanArguments(AdapterArguments):
    """The keys that a Plan is made of. Numbers of groups never count the head.

    `TransferArguments` joins these to `transformers.TrainingArguments`, whose `learning_rate`, `num_train_epochs`,
    `warmup_steps` and `lr_scheduler_type` keep their meaning.
    """

    strategy: str | None = key(
        None, "what trains when: auto, linear-probe, partial, two-phase, gradual, full, lora, scratch"
    )
    head_epochs: float = key(1.0, "two-phase: epochs of the head alone")
    unfrozen_groups: int = key(2, "partial: groups below the head that train")
    groups_per_unfreeze: int = key(1, "gradual: groups thawed at a time, from the top")
    unfreeze_interval: float = key(1.0, "gradual: epochs between two unfreezes")
    unfreeze_until: str | None = key(None, "gradual: the deepest group to thaw, by name (default: all)")
    unfreeze_trigger: str = key(
        "interval",
        "gradual: thaw each unfreeze_interval, or at a plateau, when metric_for_best_model (default: the loss) shows "
        "no gain for unfreeze_patience evaluations",
        choices=TRIGGERS,
    )
    unfreeze_patience: int = key(1, "evaluations without gain that make a plateau")
    unfreeze_restore_best: bool = key(True, "at a plateau, go back to the best weights of the stage before thawing")
    stages: list[dict[str, Any]] | None = key(
        None,
        "an explicit plan instead of a strategy, e.g. [{epochs: 1, train: head}, {epochs: 2, train: 4}, "
        "{epochs: 3, train: all, learning_rate: 1e-5}]; train is head, all, a number of groups from the top, or names",
    )
    stage_lr_decay: float = key(1.0, "factor on all rates at each unfreeze")
    unfreeze_warmup_steps: int = key(0, "steps over which a group's rate rises linearly after it thaws")
    layer_lr_decay: float | None = key(
        None, "rate(i) = learning_rate * d^(n-1-i) for backbone groups 0..n-1 from input"
    )
    layer_lr_multiplier: float | None = key(None, "rate(i) = learning_rate * m^i for backbone groups from the input")
    layer_learning_rates: dict[str, float] | None = key(
        None, "ordered {pattern on group or parameter names: rate}; first match wins"
    )
    head_learning_rate: float | None = key(None, "the head's rate (default: see the layer-wise conventions)")
    freeze: list[str] | None = key(
        None, "what never trains: names of groups, [stem, blocks.0-7], or patterns on parameter names"
    )
    layer_rules: list[Any] | None = key(None, "ordered [pattern, depth] rules for models without declared layers")

    if TYPE_CHECKING:  # `TrainingArguments` brings these
        learning_rate: float = field(init=False)
        num_train_epochs: float = field(init=False)


# ---- checks --------------------------------------------------------------------------------------------------------


def is_wanted(keys: PlanArguments) -> bool:
    """Whether any key asks for a Plan at all; `layer_rules` alone changes nothing."""
    default = PlanArguments()
    return any(getattr(keys, k) != v for k, v in asdict(default).items() if k != "layer_rules")


def frozen_entries(keys: PlanArguments) -> list[Any]:
    """The entries of `freeze`; a caller in Python may give a single one."""
    return [keys.freeze] if isinstance(keys.freeze, str) else list(keys.freeze or ())
