"""Keys that a Plan is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_transfer.config.arguments.adapter import AdapterArguments, with_adapter
from hf_transfer.config.arguments.stopping import IDLE, StoppingArguments
from hf_transfer.config.fields import setting

TRIGGERS = ("interval", "plateau")
AUTO = "auto"


@dataclass
class PlanArguments(AdapterArguments, StoppingArguments):
    """The keys that a Plan is made of. Numbers of groups never count the head.

    `TransferArguments` joins these to `transformers.TrainingArguments`, whose `num_train_epochs`, `warmup_steps` and
    `lr_scheduler_type` keep their meaning.
    """

    strategy: str | None = setting(
        None,
        "what trains when: auto, linear-probe, partial, two-phase, gradual, full, lora, scratch",
        resume="plan",
        card="changed",
    )
    learning_rate: str | float | None = setting(  # in this order, `HfArgumentParser` takes numbers
        None,
        "peak learning rate of the backbone (default: 5e-5; 1e-3 for strategy: linear-probe, 5e-4 with an adapter; "
        "auto: by a range test)",
        minimum=0,
        topic="learning rate",
        resume="plan",
        card="always",
    )
    head_epochs: float = setting(
        1.0,
        "two-phase: epochs during which the head alone trains",
        minimum=0,
        used_by=("auto", "two-phase"),
        resume="plan",
        card="changed",
    )
    unfrozen_groups: int = setting(
        2,
        "partial: number of groups below the head that train",
        minimum=0,
        used_by=("partial",),
        resume="plan",
        card="changed",
    )
    groups_per_unfreeze: int = setting(
        1,
        "gradual: groups unfrozen at a time, from the top",
        above=0,
        used_by=("gradual",),
        resume="plan",
        card="changed",
    )
    unfreeze_interval: float = setting(
        1.0, "gradual: epochs between two unfreezes", above=0, used_by=("gradual",), resume="plan", card="changed"
    )
    unfreeze_until: str | None = setting(
        None,
        "gradual: name of the deepest group to unfreeze (default: all)",
        used_by=("gradual",),
        resume="plan",
        card="changed",
    )
    unfreeze_trigger: str = setting(
        "interval",
        "gradual: unfreeze every unfreeze_interval epochs, or at a plateau, when metric_for_best_model (default: the "
        "loss) has not improved for unfreeze_patience evaluations",
        choices=TRIGGERS,
        used_by=("gradual",),
        resume="plan",
        card="changed",
    )
    unfreeze_patience: int = setting(
        1,
        "unfreeze_trigger: plateau: evaluations without improvement that make a plateau",
        above=0,
        used_by=("gradual",),
        resume="plan",
        card="changed",
    )
    unfreeze_restore_best: bool = setting(
        True,
        "unfreeze_trigger: plateau: restore the stage's best weights before unfreezing",
        used_by=("gradual",),
        resume="plan",
        card="changed",
    )
    stages: list[dict[str, Any]] | None = setting(
        None,
        "an explicit plan instead of a strategy, e.g. [{epochs: 1, train: head}, {epochs: 2, train: 4}, "
        "{epochs: 3, train: all, learning_rate: 1e-5}]; train is head, all, a number of groups from the top, or names",
        resume="plan",
        card="changed",
    )
    stage_lr_decay: float = setting(
        1.0, "factor on all learning rates at each unfreeze", above=0, resume="plan", card="changed"
    )
    unfreeze_warmup_steps: int = setting(
        0,
        "optimizer steps over which a group's learning rate rises linearly after it is unfrozen",
        minimum=0,
        resume="plan",
        card="changed",
    )
    layer_lr_decay: float | None = setting(
        None,
        "learning rate of backbone group i of n, from the input: learning_rate * d^(n-1-i)",
        above=0,
        resume="plan",
        card="changed",
    )
    layer_lr_multiplier: float | None = setting(
        None,
        "learning rate of backbone group i, from the input: learning_rate * m^i",
        above=0,
        resume="plan",
        card="changed",
    )
    layer_learning_rates: dict[str, float] | None = setting(
        None,
        "ordered {pattern on group or parameter names: learning rate}; the first match wins",
        resume="plan",
        card="changed",
    )
    head_learning_rate: float | None = setting(
        None,
        "learning rate of the head (default: follows the layer-wise learning rates)",
        above=0,
        resume="plan",
        card="changed",
    )
    freeze: list[str] | None = setting(
        None,
        "what never trains: group names, ranges such as blocks.0-7, or patterns on parameter names",
        resume="plan",
        card="changed",
    )
    batchnorm: str = setting(
        "train",
        "BatchNorm of layers that train: train updates its running statistics, frozen keeps the checkpoint's; auto: "
        "frozen for few examples or small batches",
        choices=("auto", "frozen", "train"),
        resume="plan",
        card="changed",
    )
    layer_rules: list[Any] | None = setting(
        None, "ordered [pattern, depth] rules for models that declare no layers", resume="plan", card="changed"
    )

    if TYPE_CHECKING:  # `TrainingArguments` brings it
        num_train_epochs: float = field(init=False)

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the default of the strategy and the adapter."""
        return learning_rate_of(self.learning_rate, self.strategy, self.adapter)


_TRAINERS_LEARNING_RATE = 5e-5  # the default of `TrainingArguments`
_PROBES_LEARNING_RATE = 1e-3  # a head alone takes a higher learning rate than a backbone
_ADAPTERS_LEARNING_RATE = 5e-4  # and so do adapters, which start at zero


def learning_rate_of(given: float | str | None, strategy: str | None, adapter: Any) -> float:
    """The learning rate that was given, or else the default of the strategy and the adapter, also for `auto`."""
    if given is not None and not isinstance(given, str):
        return given
    if strategy == "linear-probe":
        return _PROBES_LEARNING_RATE
    has_adapter = with_adapter(strategy, adapter) != "none"
    return _ADAPTERS_LEARNING_RATE if has_adapter else _TRAINERS_LEARNING_RATE


# ---- checks --------------------------------------------------------------------------------------------------------


def is_wanted(keys: PlanArguments) -> bool:
    """Whether any key asks for a Plan at all; `layer_rules`, `learning_rate`, `batchnorm: auto`
    and the prices alone do not."""
    idle = ("layer_rules", "learning_rate", *IDLE)
    default = asdict(PlanArguments()) | {name: getattr(keys, name) for name in idle}
    asked = {name for name, value in default.items() if getattr(keys, name) != value}
    return bool(asked - ({"batchnorm"} if keys.batchnorm == "auto" else set()))
