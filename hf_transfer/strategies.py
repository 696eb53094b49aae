"""The keys of a plan, and the strategies: functions from these keys to stage specifications.

A strategy returns a list in the form that users write under `stages:`, for example
`[{"train": "head", "epochs": 1}, {"train": 4, "epochs": 2}, {"train": "all"}]`; the last one takes what is left of
`num_train_epochs`. A new strategy is one function here and one line in `STRATEGIES`.

Sources: linear probing then fine-tuning (LP-FT), Kumar et al. 2022, section 3; gradual unfreezing and discriminative
rates, ULMFiT, Howard and Ruder 2018, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import UserError, nearest

HEAD = "head"
ADAPTERS = ("none", "lora", "dora", "rslora", "ia3", "adalora", "vera", "ln_tuning", "prompt", "prefix", "bottleneck")
# LP-FT and fastai train a pretrained body 10 to 100 times slower than its new head.
TWO_PHASE_HEAD_RATIO = 20.0
TRIGGERS = ("interval", "plateau")


def key(default: Any, doc: str, choices: Sequence[str] = ()) -> Any:
    """A dataclass field that is a key: its default, what `--help` says, and the values it may have."""
    # HfArgumentParser hands the metadata to argparse, which takes empty choices for "no value is right".
    return field(default=default, metadata={"help": doc, **({"choices": tuple(choices)} if choices else {})})


@dataclass
class AdapterArguments:
    """The keys of an adapter: small trained parts in a frozen backbone. `hf_transfer.adapters` attaches it."""

    adapter: dict[str, Any] | str | None = key(
        "none",
        "none, lora, dora, rslora, ia3, adalora, vera, ln_tuning, prompt, prefix, bottleneck, or any configuration of "
        "peft as a mapping, e.g. {peft_type: LOHA, r: 4}",
    )
    lora_r: int = key(8, "rank of lora, dora and rslora; target rank of adalora")
    lora_alpha: float | None = key(None, "the update is scaled by lora_alpha / lora_r (default: 2 * lora_r)")
    lora_dropout: float = key(0.0, "dropout before the low-rank update, as a share")
    lora_target_modules: list[str] | None = key(
        None,
        "modules to adapt, by full name, end of name or pattern (default: every linear layer and ungrouped convolution "
        "in the blocks; for ln_tuning, the norms)",
    )
    lora_plus_ratio: float | None = key(None, "LoRA+: lora_B learns at so many times the rate of lora_A, e.g. 16")

    @property
    def is_adapted(self) -> bool:
        return self.adapter not in (None, "none")


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


# ---- strategies: functions from keys to stage specifications -------------------------------------------------------

Spec = dict[str, Any]


def linear_probe(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """Feature extraction: the backbone is frozen, the head is trained."""
    return [{"train": HEAD}]


def partial(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """The head and the last `unfrozen_groups` groups."""
    return [{"train": keys.unfrozen_groups}]


def two_phase(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """The head alone, then everything (LP-FT).

    The backbone's rate is `learning_rate`; with no key that says otherwise the head's is 20 times that.
    """
    silent = (keys.head_learning_rate, keys.layer_lr_decay, keys.layer_lr_multiplier, keys.layer_learning_rates)
    slower = all(k is None for k in silent) and not keys.is_adapted  # an adapter is as new as the head
    rates = {"head_learning_rate": TWO_PHASE_HEAD_RATIO * keys.learning_rate} if slower else {}
    head = [{"train": HEAD, "epochs": keys.head_epochs, **rates}] if keys.head_epochs > 0 else []
    return [*head, {"train": "all", **rates}]


def gradual(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """The head, then `groups_per_unfreeze` more groups from the top each `unfreeze_interval` epochs (ULMFiT), or
    whenever the stage before has come to a plateau."""
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
    specs[-1].pop("patience", None)  # there is nothing left to thaw
    return specs


def full(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """Everything, from the first step."""
    return [{"train": "all"}]


def auto(keys: PlanArguments, backbone: Sequence[str]) -> list[Spec]:
    """Two phases; with an adapter, which starts at the pretrained function, everything that may train at once."""
    return full(keys, backbone) if keys.is_adapted else two_phase(keys, backbone)


Strategy = Callable[[PlanArguments, Sequence[str]], list[Spec]]
STRATEGIES: dict[str, Strategy] = {
    "auto": auto,
    "linear-probe": linear_probe,
    "partial": partial,
    "two-phase": two_phase,
    "gradual": gradual,
    "full": full,
    "lora": full,  # `with_adapter` gives it one
    "scratch": full,  # the same plan; `train` and `fine_tune` make the weights random
}
# Keys that only some strategies read: given with another one they would silently do nothing.
_READ_BY: dict[str, tuple[str, ...]] = {
    "head_epochs": ("auto", "two-phase"),
    "unfrozen_groups": ("partial",),
    "groups_per_unfreeze": ("gradual",),
    "unfreeze_interval": ("gradual",),
    "unfreeze_until": ("gradual",),
    "unfreeze_trigger": ("gradual",),
    "unfreeze_patience": ("gradual",),
    "unfreeze_restore_best": ("gradual",),
}
_SPEC_KEYS = ("name", "epochs", "train", "learning_rate", "head_learning_rate", "layer_lr_decay", "layer_lr_multiplier")


def with_adapter(strategy: str | None, adapter: Any) -> Any:
    """The adapter that `strategy` and `adapter` mean together: `strategy: lora` is `full` with one."""
    return "lora" if strategy == "lora" and adapter in (None, "none") else "none" if adapter is None else adapter


# ---- checks --------------------------------------------------------------------------------------------------------


def is_wanted(keys: PlanArguments) -> bool:
    """Whether any key asks for a Plan at all; `layer_rules` alone changes nothing."""
    default = PlanArguments()
    return any(getattr(keys, k) != v for k, v in asdict(default).items() if k != "layer_rules")


def check(keys: PlanArguments) -> list[str]:
    """Every problem of the plan keys that shows without a model."""
    default = PlanArguments()
    problems = []
    if keys.strategy is not None and keys.strategy not in STRATEGIES:
        problems.append(
            f"strategy: {keys.strategy!r} is not one of {', '.join(STRATEGIES)}." + nearest(keys.strategy, STRATEGIES)
        )
    elif keys.strategy is not None and keys.stages is not None and keys.strategy != "auto":
        problems.append(
            f"strategy and stages contradict each other: stages is a plan of its own, so leave out "
            f"strategy: {keys.strategy}."
        )
    chosen = "stages" if keys.stages is not None else keys.strategy or "full"
    for name, readers in _READ_BY.items():
        if (
            chosen in (*STRATEGIES, "stages")
            and chosen not in readers
            and getattr(keys, name) != getattr(default, name)
        ):
            problems.append(
                f"{name}: {getattr(keys, name)!r} has no effect with "
                f"{'stages' if chosen == 'stages' else f'strategy: {chosen}'}; it belongs to "
                f"{' and '.join(readers)}."
            )
    if keys.layer_lr_decay is not None and keys.layer_lr_multiplier is not None:
        problems.append(
            "layer_lr_decay and layer_lr_multiplier contradict each other: the first counts down from the "
            "head, the second up from the input. Keep one."
        )
    problems += _check_trigger(keys)
    problems += _check_adapter(keys)
    problems += _check_numbers(keys)
    problems += [f"layer_rules[{i}]: {p}" for i, rule in enumerate(keys.layer_rules or ()) for p in _check_rule(rule)]
    problems += [f"stages[{i}]: {p}" for i, spec in enumerate(keys.stages or ()) for p in _check_spec(spec)]
    if keys.stages is not None and not keys.stages:
        problems.append("stages: the list is empty; give at least one stage, e.g. [{epochs: 3, train: all}].")
    return problems


def _check_trigger(keys: PlanArguments) -> Iterable[str]:
    default = PlanArguments()
    if keys.unfreeze_trigger not in TRIGGERS:
        yield (
            f"unfreeze_trigger: {keys.unfreeze_trigger!r} is not one of {', '.join(TRIGGERS)}."
            + nearest(keys.unfreeze_trigger, TRIGGERS)
        )
        return
    plateau = keys.unfreeze_trigger == "plateau"
    idle = ("unfreeze_interval",) if plateau else ("unfreeze_patience", "unfreeze_restore_best")
    for name in idle:
        if keys.strategy == "gradual" and getattr(keys, name) != getattr(default, name):
            yield f"{name}: {getattr(keys, name)!r} has no effect with unfreeze_trigger: {keys.unfreeze_trigger}."


def frozen_entries(keys: PlanArguments) -> list[Any]:
    """The entries of `freeze`; a caller in Python may give a single one."""
    return [keys.freeze] if isinstance(keys.freeze, str) else list(keys.freeze or ())


# Which adapters read a key; None is a mapping, which holds its own keys but for the modules.
_LOW_RANK = ("lora", "dora", "rslora", "adalora")
_READ_BY_ADAPTERS: dict[str, tuple[str | None, ...]] = {
    "lora_r": _LOW_RANK,
    "lora_alpha": _LOW_RANK,
    "lora_dropout": _LOW_RANK,
    "lora_plus_ratio": (None, *_LOW_RANK),
    "lora_target_modules": (None, *(a for a in ADAPTERS if a not in ("none", "prompt", "prefix"))),
}


def _check_adapter(keys: PlanArguments) -> Iterable[str]:
    default = PlanArguments()
    chosen = with_adapter(keys.strategy, keys.adapter)
    if isinstance(chosen, Mapping):
        if not isinstance(chosen.get("peft_type"), str):
            yield f"adapter: {dict(chosen)!r} does not say its peft_type, for example {{peft_type: LORA, r: 4}}."
        chosen = None
    elif chosen not in ADAPTERS:
        yield (
            f"adapter: {chosen!r} is neither one of {', '.join(ADAPTERS)} nor a mapping with a peft_type."
            + nearest(str(chosen), ADAPTERS)
        )
        return
    for name, readers in _READ_BY_ADAPTERS.items():
        if getattr(keys, name) != getattr(default, name) and chosen not in readers:
            given = "a mapping, which holds it itself" if chosen is None else f"adapter: {chosen}"
            yield f"{name}: {getattr(keys, name)!r} has no effect with {given}."
    if chosen != "none" and keys.strategy == "scratch":
        yield "adapter: it belongs to a pretrained backbone, and strategy: scratch has none."
    for name in ("lora_r", "lora_alpha", "lora_plus_ratio"):
        value = getattr(keys, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield f"{name}: {value} is not a positive number."
    if not 0 <= keys.lora_dropout < 1:
        yield f"lora_dropout: {keys.lora_dropout:g} is not from 0 to below 1."


def _check_numbers(keys: PlanArguments) -> Iterable[str]:
    positive = (
        "layer_lr_decay",
        "layer_lr_multiplier",
        "head_learning_rate",
        "unfreeze_interval",
        "groups_per_unfreeze",
        "unfreeze_patience",
        "stage_lr_decay",
    )
    for name in positive:
        value = getattr(keys, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield f"{name}: {value} is not a positive number."
    for name in ("head_epochs", "unfrozen_groups", "unfreeze_warmup_steps"):
        if getattr(keys, name) < 0:
            yield f"{name}: {getattr(keys, name)} is negative."
    if keys.layer_lr_decay is not None and keys.layer_lr_decay > 1:
        yield f"layer_lr_decay: {keys.layer_lr_decay} is over 1, which would train the input fastest; use e.g. 0.75."
    for entry in frozen_entries(keys):
        if not isinstance(entry, str) or not entry:
            yield f"freeze: {entry!r} is not the name of a group, a range such as blocks.0-7, or a pattern."
    for pattern, rate in (keys.layer_learning_rates or {}).items():
        if not isinstance(pattern, str):
            yield f"layer_learning_rates: the pattern {pattern!r} is not a text; write it in quotes."
            continue
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            yield f"layer_learning_rates: the rate of {pattern!r} is {rate!r}, not a number of 0 or more."
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"layer_learning_rates: {pattern!r} is not a regular expression ({error})."


def _check_rule(rule: Any) -> Iterable[str]:
    if not isinstance(rule, list | tuple) or len(rule) != 2:
        yield f"{rule!r} is not a pair of a pattern and a depth, such as ['^embed', stem]."
        return
    pattern, depth = rule
    if not isinstance(pattern, str):
        yield f"the pattern {pattern!r} is not a text."
    is_number = isinstance(depth, int | float) and not isinstance(depth, bool)
    if not (depth is None or isinstance(depth, str) or (is_number and 0 <= depth < math.inf)):
        yield f"the depth {depth!r} is not stem, last, head, next, null, or a number of 0 or more."


def _check_spec(spec: Any) -> Iterable[str]:
    if not isinstance(spec, Mapping):
        yield f"{spec!r} is not a mapping such as {{epochs: 1, train: head}}."
        return
    for name in spec:
        if name not in _SPEC_KEYS:
            yield f"unknown key {name!r}; a stage has {', '.join(_SPEC_KEYS)}.{nearest(name, _SPEC_KEYS)}"
    train = spec.get("train")
    if train is None:
        yield "train is missing; it is head, all, a number of groups from the top, or a list of group names."
    elif isinstance(train, bool) or not isinstance(train, int | str | list | tuple):
        yield f"train: {train!r} is not head, all, a whole number of groups, or a list of group names."
    for name in ("epochs", "learning_rate", "head_learning_rate", "layer_lr_decay", "layer_lr_multiplier"):
        value = spec.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            yield f"{name}: {value!r} is not a positive number."
        elif name == "layer_lr_decay" and value is not None and value > 1:
            yield f"layer_lr_decay: {value} is over 1, which would train the input fastest; use e.g. 0.75."
    if spec.get("epochs") is None:
        yield "epochs is missing; `stages` sets the run's length."
    if spec.get("layer_lr_decay") is not None and spec.get("layer_lr_multiplier") is not None:
        yield "layer_lr_decay and layer_lr_multiplier contradict each other. Keep one."
