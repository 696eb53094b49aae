"""A fine-tuning run as data: a list of stages, each saying which layer groups train, how long, and how fast.

A strategy is a function that returns a list of stage specifications, in the form that users write under `stages:`;
`make_plan` turns any such list into a `Plan`. The trainer executes the Plan and knows nothing of strategies.

Sources: linear probing then fine-tuning (LP-FT), Kumar et al. 2022, section 3; gradual unfreezing and discriminative
rates, ULMFiT, Howard and Ruder 2018, section 3.2 and 3.3; layer-wise decay as in ELECTRA, Clark et al. 2020, appendix A,
with the difference that the topmost block gets the full rate (ELECTRA's code gives it one decay).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from .errors import UserError, UserErrors, nearest

HEAD = "head"
# LP-FT and fastai train a pretrained body 10 to 100 times slower than its new head.
TWO_PHASE_HEAD_RATIO = 20.0


class Group(Protocol):
    """What a plan needs to know of a layer group (`layers.LayerGroup` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def num_trainable(self) -> int: ...


def _key(default: Any, doc: str, **metadata: Any) -> Any:
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata={"help": doc, **metadata})


@dataclass
class PlanArguments:
    """The keys that a Plan is made of. Numbers of groups never count the head.

    `TransferArguments` joins these to `transformers.TrainingArguments`, whose `learning_rate`, `num_train_epochs`,
    `warmup_steps` and `lr_scheduler_type` keep their meaning.
    """

    strategy: str | None = _key(
        None, "what trains when: auto, linear-probe, partial, two-phase, gradual, full, scratch"
    )
    head_epochs: float = _key(1.0, "two-phase: epochs of the head alone")
    unfrozen_groups: int = _key(2, "partial: groups below the head that train")
    groups_per_unfreeze: int = _key(1, "gradual: groups thawed at a time, from the top")
    unfreeze_interval: float = _key(1.0, "gradual: epochs between two unfreezes")
    unfreeze_until: str | None = _key(None, "gradual: the deepest group to thaw, by name (default: all)")
    stages: list[dict[str, Any]] | None = _key(
        None,
        "an explicit plan instead of a strategy, e.g. [{epochs: 1, train: head}, {epochs: 2, train: 4}, "
        "{epochs: 3, train: all, learning_rate: 1e-5}]; train is head, all, a number of groups from the top, or names",
    )
    stage_lr_decay: float = _key(1.0, "factor on all rates at each unfreeze")
    unfreeze_warmup_steps: int = _key(0, "steps over which a group's rate rises linearly after it thaws")
    layer_lr_decay: float | None = _key(
        None, "rate(i) = learning_rate * d^(n-1-i) for backbone groups 0..n-1 from input"
    )
    layer_lr_multiplier: float | None = _key(None, "rate(i) = learning_rate * m^i for backbone groups from the input")
    layer_learning_rates: dict[str, float] | None = _key(
        None, "ordered {pattern on group or parameter names: rate}; first match wins"
    )
    head_learning_rate: float | None = _key(None, "the head's rate (default: see the layer-wise conventions)")
    layer_rules: list[Any] | None = _key(None, "ordered [pattern, depth] rules for models without declared layers")


class PlanConfig(Protocol):
    """`PlanArguments` plus what `TrainingArguments` already has."""

    learning_rate: float
    num_train_epochs: float
    strategy: str | None
    head_epochs: float
    unfrozen_groups: int
    groups_per_unfreeze: int
    unfreeze_interval: float
    unfreeze_until: str | None
    stages: list[dict[str, Any]] | None
    stage_lr_decay: float
    unfreeze_warmup_steps: int
    layer_lr_decay: float | None
    layer_lr_multiplier: float | None
    layer_learning_rates: dict[str, float] | None
    head_learning_rate: float | None


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Attributes:
        name: what trains, in words.
        epochs: how long, in epochs of the training set.
        trainable: names of the layer groups that train, input to head.
        rates: ordered (pattern, learning rate) rules over group and parameter names; the first match wins.
        start: the optimizer step at which the stage begins, once the plan is resolved.
    """

    name: str
    epochs: float
    trainable: tuple[str, ...]
    rates: tuple[tuple[str, float], ...]
    start: int | None = None

    def rate(self, group: str, parameter: str = "") -> float:
        """Learning rate of a parameter in this stage; 0.0 where it is frozen."""
        if group not in self.trainable:
            return 0.0
        return next((rate for pattern, rate in self.rates if matches(pattern, group, parameter)), 0.0)


@dataclass(frozen=True)
class Plan:
    """Stages over named groups. Pure data: comparable, hashable, printable."""

    strategy: str
    groups: tuple[tuple[str, int], ...]  # (name, trainable parameters), input to head
    stages: tuple[Stage, ...]
    unfreeze_warmup_steps: int = 0

    @property
    def never_thawed(self) -> tuple[str, ...]:
        """Groups that no stage trains."""
        thawed = {g for stage in self.stages for g in stage.trainable}
        return tuple(name for name, _ in self.groups if name not in thawed)

    @property
    def num_train_epochs(self) -> float:
        return sum(stage.epochs for stage in self.stages)

    def resolve(self, steps_per_epoch: int) -> Plan:
        """The same plan with every stage's first optimizer step filled in."""
        starts, epochs = [], 0.0
        for stage in self.stages:
            starts.append(round(epochs * steps_per_epoch))
            epochs += stage.epochs
        return replace(self, stages=tuple(replace(s, start=at) for s, at in zip(self.stages, starts, strict=True)))

    def at(self, step: int) -> int:
        """Index of the stage that optimizer step `step` (0 for the first) belongs to, in a resolved plan."""
        return max(i for i, stage in enumerate(self.stages) if stage.start is not None and stage.start <= step)

    def rate(self, step: int, group: str, parameter: str = "") -> float:
        """Learning rate at a step of a resolved plan, before the run's own schedule is applied to it."""
        index = self.at(step)
        rate = self.stages[index].rate(group, parameter)
        if not rate or not self.unfreeze_warmup_steps:
            return rate
        thaw = index
        while thaw > 0 and self.stages[thaw - 1].rate(group, parameter) > 0:
            thaw -= 1
        start = self.stages[thaw].start
        assert start is not None, "an unresolved plan has no steps"
        return rate * min(1.0, (step - start) / self.unfreeze_warmup_steps)

    def num_trainable(self, stage: Stage) -> int:
        return sum(size for name, size in self.groups if name in stage.trainable)

    def to_list(self) -> list[dict[str, Any]]:
        """The stages as plain data, as `results.json` holds them."""
        return [
            {
                "name": s.name,
                "epochs": s.epochs,
                "groups": list(s.trainable),
                "trainable_parameters": self.num_trainable(s),
                "learning_rates": {g: s.rate(g) for g in s.trainable},
            }
            for s in self.stages
        ]

    def __str__(self) -> str:
        return _table(self)


# ---- strategies: functions from keys to stage specifications -------------------------------------------------------

Spec = dict[str, Any]


def linear_probe(keys: PlanConfig, backbone: Sequence[str]) -> list[Spec]:
    """Feature extraction: the backbone is frozen, the head is trained."""
    return [{"train": HEAD}]


def partial(keys: PlanConfig, backbone: Sequence[str]) -> list[Spec]:
    """The head and the last `unfrozen_groups` groups."""
    return [{"train": keys.unfrozen_groups}]


def two_phase(keys: PlanConfig, backbone: Sequence[str]) -> list[Spec]:
    """The head alone, then everything (LP-FT).

    The backbone's rate is `learning_rate`; with no key that says otherwise the head's is 20 times that.
    """
    silent = (keys.head_learning_rate, keys.layer_lr_decay, keys.layer_lr_multiplier, keys.layer_learning_rates)
    rates = {"head_learning_rate": TWO_PHASE_HEAD_RATIO * keys.learning_rate} if all(k is None for k in silent) else {}
    head = [{"train": HEAD, "epochs": keys.head_epochs, **rates}] if keys.head_epochs > 0 else []
    return [*head, {"train": "all", **rates}]


def gradual(keys: PlanConfig, backbone: Sequence[str]) -> list[Spec]:
    """The head, then `groups_per_unfreeze` more groups from the top each `unfreeze_interval` epochs (ULMFiT)."""
    if keys.unfreeze_until is not None and keys.unfreeze_until not in backbone:
        raise UserError(
            f"unfreeze_until: there is no group {keys.unfreeze_until!r} below the head.",
            f"The groups are {', '.join(backbone)}.{nearest(keys.unfreeze_until, backbone)}",
        )
    deepest = backbone.index(keys.unfreeze_until) if keys.unfreeze_until is not None else 0
    most = len(backbone) - deepest
    counts = [*range(keys.groups_per_unfreeze, most, keys.groups_per_unfreeze), most]
    return [
        {"train": HEAD, "epochs": keys.unfreeze_interval},
        *({"train": k, "epochs": keys.unfreeze_interval} for k in counts),
    ]


def full(keys: PlanConfig, backbone: Sequence[str]) -> list[Spec]:
    """Everything, from the first step."""
    return [{"train": "all"}]


Strategy = Callable[[PlanConfig, Sequence[str]], list[Spec]]
STRATEGIES: dict[str, Strategy] = {
    "auto": two_phase,
    "linear-probe": linear_probe,
    "partial": partial,
    "two-phase": two_phase,
    "gradual": gradual,
    "full": full,
    "scratch": full,  # the same plan; the weights are random
}
# Keys that only some strategies read: given with another one they would silently do nothing.
_READ_BY: dict[str, tuple[str, ...]] = {
    "head_epochs": ("auto", "two-phase"),
    "unfrozen_groups": ("partial",),
    "groups_per_unfreeze": ("gradual",),
    "unfreeze_interval": ("gradual",),
    "unfreeze_until": ("gradual",),
}
_SPEC_KEYS = ("name", "epochs", "train", "learning_rate", "head_learning_rate", "layer_lr_decay", "layer_lr_multiplier")


# ---- from keys to a Plan -------------------------------------------------------------------------------------------


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
    problems += _check_numbers(keys)
    problems += [f"stages[{i}]: {p}" for i, spec in enumerate(keys.stages or ()) for p in _check_spec(spec)]
    if keys.stages is not None and not keys.stages:
        problems.append("stages: the list is empty; give at least one stage, e.g. [{epochs: 3, train: all}].")
    return problems


def _check_numbers(keys: PlanArguments) -> Iterable[str]:
    positive = (
        "layer_lr_decay",
        "layer_lr_multiplier",
        "head_learning_rate",
        "unfreeze_interval",
        "groups_per_unfreeze",
        "stage_lr_decay",
    )
    for name in positive:
        value = getattr(keys, name)
        if value is not None and not value > 0:
            yield f"{name}: {value} is not a positive number."
    for name in ("head_epochs", "unfrozen_groups", "unfreeze_warmup_steps"):
        if getattr(keys, name) < 0:
            yield f"{name}: {getattr(keys, name)} is negative."
    if keys.layer_lr_decay is not None and keys.layer_lr_decay > 1:
        yield f"layer_lr_decay: {keys.layer_lr_decay} is over 1, which would train the input fastest; use e.g. 0.75."
    for pattern, rate in (keys.layer_learning_rates or {}).items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate >= 0:
            yield f"layer_learning_rates: the rate of {pattern!r} is {rate!r}, not a number of 0 or more."
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"layer_learning_rates: {pattern!r} is not a regular expression ({error})."


def _check_spec(spec: Any) -> Iterable[str]:
    if not isinstance(spec, Mapping):
        yield f"{spec!r} is not a mapping such as {{epochs: 1, train: head}}."
        return
    for key in spec:
        if key not in _SPEC_KEYS:
            yield f"unknown key {key!r}; a stage has {', '.join(_SPEC_KEYS)}.{nearest(key, _SPEC_KEYS)}"
    if "train" not in spec:
        yield "train is missing; it is head, all, a number of groups from the top, or a list of group names."
    for key in ("epochs", "learning_rate", "head_learning_rate", "layer_lr_decay", "layer_lr_multiplier"):
        value = spec.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            yield f"{key}: {value!r} is not a positive number."
    if "epochs" not in spec:
        yield "epochs is missing; `stages` sets the run's length."


def make_plan(config: PlanConfig, groups: Sequence[Group], facts: Any = None) -> Plan:
    """The Plan that `config` asks for over `groups` (input to head, the head last).

    Args:
        config: `PlanArguments` plus `learning_rate` and `num_train_epochs`.
        groups: layer groups of the model.
        facts: what is known of the data; none of today's strategies looks at it.

    Raises:
        UserError: names or counts of groups that do not exist, patterns that match nothing, a stage in which nothing
            trains.
    """
    backbone = [g.name for g in groups[:-1]]
    strategy = "stages" if config.stages is not None else config.strategy or "full"
    specs = config.stages if config.stages is not None else STRATEGIES[strategy](config, backbone)
    total = sum(s["epochs"] for s in specs) if config.stages is not None else config.num_train_epochs
    _check_patterns(config.layer_learning_rates or {}, groups)
    stages: list[Stage] = []
    begun, unfreezes = 0.0, 0
    for i, spec in enumerate(specs):
        if begun >= total:
            break  # `never_thawed` says what the epochs did not reach
        last = i == len(specs) - 1
        epochs = total - begun if last else min(float(spec.get("epochs", total)), total - begun)
        trainable = _trainable(spec["train"], [g.name for g in groups])
        if stages and set(trainable) - set(stages[-1].trainable):
            unfreezes += 1
        rates = _rates(config, spec, backbone, config.stage_lr_decay**unfreezes)
        stage = Stage(str(spec.get("name") or _stage_name(trainable, backbone)), epochs, trainable, rates)
        if not any(g.num_trainable and any(stage.rate(g.name, p) > 0 for p in g.parameters) for g in groups):
            raise UserError(f"Stage {stage.name!r} trains nothing: every parameter in it is frozen or has rate 0.")
        stages.append(stage)
        begun += epochs
    return Plan(
        strategy if strategy != "auto" else "two-phase",
        tuple((g.name, g.num_trainable) for g in groups),
        tuple(stages),
        config.unfreeze_warmup_steps,
    )


def _trainable(train: Any, names: list[str]) -> tuple[str, ...]:
    """Group names, input to head, that a stage's `train` means."""
    backbone = names[:-1]
    if train == "all":
        return tuple(names)
    if train == HEAD:
        return (HEAD,)
    if isinstance(train, int) and not isinstance(train, bool):
        if not 0 <= train <= len(backbone):
            raise UserError(
                f"{train} groups cannot be unfrozen: the model has {len(backbone)} below the head.",
                f"They are {', '.join(backbone)}.",
            )
        return tuple(names[len(backbone) - train :])
    wanted = [train] if isinstance(train, str) else list(train)
    for name in wanted:
        if name not in names:
            raise UserError(
                f"There is no layer group {name!r}.", f"The groups are {', '.join(names)}.{nearest(name, names)}"
            )
    return tuple(n for n in names if n in wanted)


def _rates(config: PlanConfig, spec: Spec, backbone: list[str], factor: float) -> tuple[tuple[str, float], ...]:
    """Ordered rules: the user's patterns first, then each group by its name."""
    base = float(spec.get("learning_rate", config.learning_rate))
    decay = spec.get("layer_lr_decay", config.layer_lr_decay)
    multiplier = spec.get("layer_lr_multiplier", config.layer_lr_multiplier)
    if "layer_lr_decay" in spec:
        multiplier = spec.get("layer_lr_multiplier")
    elif "layer_lr_multiplier" in spec:
        decay = None
    n = len(backbone)
    if decay is not None:
        rates, head = [base * decay ** (n - 1 - i) for i in range(n)], base
    elif multiplier is not None:
        rates, head = [base * multiplier**i for i in range(n)], base * multiplier**n
    else:
        rates, head = [base] * n, base
    head = spec.get("head_learning_rate", head if config.head_learning_rate is None else config.head_learning_rate)
    named = zip([*backbone, HEAD], [*rates, head], strict=True)
    user = (config.layer_learning_rates or {}).items()
    return tuple((p, float(r) * factor) for p, r in (*user, *((re.escape(g), r) for g, r in named)))


def matches(pattern: str, group: str, parameter: str = "") -> bool:
    """Whether `pattern` is the whole name of the group, or whole dotted parts of the parameter's name.

    `layer.1` is in `encoder.layer.1.output.bias` but not in `encoder.layer.11.output.bias`.
    """
    return bool(re.fullmatch(pattern, group) or (parameter and re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", parameter)))


def _check_patterns(rates: Mapping[str, float], groups: Sequence[Group]) -> None:
    names = [g.name for g in groups]
    problems = [
        f"layer_learning_rates: the pattern {pattern!r} matches no group and no parameter. "
        f"The groups are {', '.join(names)}.{nearest(pattern, names)}"
        for pattern in rates
        if not any(matches(pattern, g.name, p) for g in groups for p in g.parameters)
    ]
    if problems:
        raise UserErrors(problems)


def _stage_name(trainable: tuple[str, ...], backbone: list[str]) -> str:
    below = [g for g in trainable if g != HEAD]
    if not below:
        return HEAD
    if len(below) == len(backbone):
        return "all groups" if HEAD in trainable else "backbone"
    if HEAD in trainable and below == backbone[-len(below) :]:
        return "top 1 group" if len(below) == 1 else f"top {len(below)} groups"
    return ", ".join(trainable)


# ---- printing ------------------------------------------------------------------------------------------------------


def _table(plan: Plan) -> str:
    total = sum(size for _, size in plan.groups)
    head = f"Plan: {plan.strategy}, {plan.num_train_epochs:g} epochs, {len(plan.groups) - 1} groups and the head"
    rows = [("stage", "epochs", "trains", "parameters", "learning rates, input to head")]
    for i, stage in enumerate(plan.stages):
        size = plan.num_trainable(stage)
        share = f"{size:,} ({100 * size / total:.1f}%)" if total else str(size)
        start = "" if stage.start is None else f" from step {stage.start}"
        rows.append(
            (f"{i + 1} {stage.name}", f"{stage.epochs:g}{start}", _span(stage.trainable), share, _rate_span(stage))
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    notes = [f"Never trained in these epochs: {', '.join(plan.never_thawed)}."] if plan.never_thawed else []
    return "\n".join([head, *lines, *notes])


def _span(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-2]}, {names[-1]}"


def _rate_span(stage: Stage) -> str:
    rates = [f"{stage.rate(g):.2g}" for g in stage.trainable]
    body, head = rates[:-1], rates[-1]
    if not body:
        return head
    return f"{body[0]}, {head}" if len(set(body)) == 1 else f"{body[0]} … {body[-1]}, {head}"
