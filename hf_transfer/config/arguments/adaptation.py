"""Keys of domain adaptation: a labeled source, an unlabeled target, and what draws their features together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting
from hf_transfer.errors import listed

NONE, AUTO, MMD, CORAL, DANN, PSEUDO_LABEL = "none", "auto", "mmd", "coral", "dann", "pseudo-label"
LINEAR_OT = "linear-ot"
PENALTIES = (MMD, CORAL, DANN)
METHODS = (*PENALTIES, PSEUDO_LABEL)  # that a run trains with
FROZEN = (CORAL, LINEAR_OT)  # methods on frozen features, before a head is solved for
RAMP, CONSTANT = "ramp", "constant"
PER_CLASS, QUANTILE = "per-class", "quantile"
_WEIGHTS = {MMD: 10.0}  # of a penalty, measured: see docs/domain-adaptation.md; 1 of the others
IN_MEMORY = "in memory"  # what the key of data that was passed as a Python object holds
_KEY, _LABELS = "domain_adaptation", "target_label_column_name"
_DEFAULTS: dict[str, Any] = {
    "domain_adaptation_weight": None,
    "domain_adaptation_layer": None,
    "domain_adaptation_schedule": RAMP,
    "discriminator_learning_rate": 1e-3,
    "pseudo_label_threshold": None,
    "pseudo_label_rounds": None,
}
_OF_DANN = ("discriminator_learning_rate",)
_OF_PENALTIES = ("domain_adaptation_weight", "domain_adaptation_layer", "domain_adaptation_schedule")
_OF_LABELS = ("pseudo_label_threshold", "pseudo_label_rounds")


@dataclass
class TargetArguments:
    """Which data a model must work on."""

    target_dataset_name: str | None = setting(
        None,
        "unlabeled data of the domain that the model must work on, as dataset_name; its training split is used",
        topic="domain adaptation",
        resume="free",
    )
    target_label_column_name: str | None = setting(
        None,
        "label column of the target, for the few examples of it that are labeled (blank: unlabeled) and trained on "
        "next to the source's, also with domain_adaptation: none; of an image folder, the class folders (default: "
        "labels of the target are ignored)",
        topic="domain adaptation",
        resume="fixed",
    )
    target_in_memory: Any = setting(None, "target_dataset_name as a Python object, from `fine_tune`", resume="free")


@dataclass
class AdaptationArguments:
    """How the features of source and target are drawn together."""

    domain_adaptation: str = setting(
        NONE,
        "how the target is used: mmd (kernel distance), coral (covariances) or dann (a discriminator that the backbone "
        "learns to deceive) draw its features to the source's, pseudo-label trains on the model's own answers; auto "
        "trains with each and without, and keeps the best; with probe_solver: lbfgs, the map of frozen features from "
        "source to target: coral or linear-ot (optimal transport)",
        choices=(NONE, AUTO, *METHODS, LINEAR_OT),
        topic="domain adaptation",
        resume="fixed",
        card="changed",
    )
    domain_adaptation_weight: float | None = setting(
        None,
        "weight of the penalty next to the loss of the source (default: 10 with mmd, else 1)",
        minimum=0,
        topic="domain adaptation",
        resume="fixed",
        card="changed",
    )
    domain_adaptation_layer: str | None = setting(
        None,
        "layer group whose mean output is aligned (default: what the head reads)",
        topic="domain adaptation",
        resume="fixed",
        card="changed",
    )
    domain_adaptation_schedule: str = setting(
        RAMP,
        "weight over the run: ramp (from 0 up to domain_adaptation_weight) or constant",
        choices=(RAMP, CONSTANT),
        topic="domain adaptation",
        resume="fixed",
        card="changed",
    )
    discriminator_learning_rate: float = setting(
        1e-3, "learning rate of the discriminator of dann", above=0, topic="domain adaptation", resume="fixed"
    )
    pseudo_label_threshold: float | str | None = setting(
        None,
        "which target examples pseudo-label trains on: a probability that the answer must have, or a fraction that "
        "grows from round to round, of the examples of each class (per-class, the default) or of all (quantile)",
        choices=(PER_CLASS, QUANTILE),
        above=0,
        below=1,
        topic="domain adaptation",
        resume="fixed",
        card="changed",
    )
    pseudo_label_rounds: int | None = setting(
        None,
        "how often pseudo-label labels the target anew (default: 3, if there are as many epochs and one more)",
        minimum=1,
        topic="domain adaptation",
        resume="fixed",
        card="changed",
    )


def weight_of(given: float | None, method: str) -> float | None:
    """`domain_adaptation_weight`: the one that was given, or else the method's; None for one without a penalty."""
    return (_WEIGHTS.get(method, 1.0) if method in PENALTIES else None) if given is None else given


def threshold_of(given: float | str | None) -> float | str:
    """`pseudo_label_threshold`, or its default."""
    return PER_CLASS if given is None else given


def values_for(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The values of all keys with a method in place of `auto`, without those that it does not read."""
    found = {**values, _KEY: method}
    if method == NONE:
        return found | _DEFAULTS | ({} if values[_LABELS] is not None else {"target_dataset_name": None})
    found |= {name: _DEFAULTS[name] for name, _ in _unread(found)}
    return found | {"domain_adaptation_weight": weight_of(None, method)}


def aligns_frozen(args: Any) -> bool:
    """Whether frozen features are aligned before a head is solved for; `args` also has the keys of the probe."""
    return args.domain_adaptation in FROZEN and args.probe_solver == "lbfgs"


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys among themselves and with those of the training, one sentence each."""
    method = values[_KEY]
    changed = {
        name: values[name]
        for name, default in _DEFAULTS.items()
        if values[name] != default
        and not (name == "domain_adaptation_weight" and values[name] == weight_of(None, method))
    }
    if method == NONE:
        return [
            f"{name}: {value!r} has no effect without {_KEY}; set {_KEY}: auto or {listed(METHODS)}."
            for name, value in changed.items()
        ]
    named = f"{_KEY}: {method}"
    if values["probe_solver"] == "lbfgs":
        return _check_frozen(method, named, changed)
    problems = [f"{name}: {values[name]!r} has no effect with {named}; {of}." for name, of in _unread(values)]
    reasons = (
        (method == LINEAR_OT, "aligns frozen features; set strategy: linear-probe and probe_solver: lbfgs"),
        (values["strategy"] is None and values["stages"] is None, "needs a plan; set strategy: full or another one"),
        (
            values["strategy"] == "linear-probe" and values["stages"] is None and method != LINEAR_OT,
            "changes the features, and strategy: linear-probe freezes them; use full, two-phase, gradual or lora, or "
            "align frozen features with coral and probe_solver: lbfgs",
        ),
        (
            values["balanced_sampling"],
            "pairs each source example with a target example, and balanced_sampling would repeat the same pairs; use "
            "class_weights: auto",
        ),
        (
            values["replay_dataset_name"],
            "pairs the examples of the training set by number, and replay_dataset_name puts others between them; leave "
            "one of them out",
        ),
        (
            values["boundary_cache"] in ("memory", "disk"),
            "draws other target examples in each epoch, which a boundary cache does not hold; leave boundary_cache out",
        ),
        (
            values["torch_compile"] and method != PSEUDO_LABEL,
            "reads the features inside the model, where torch_compile leaves no place; leave torch_compile out",
        ),
        (
            method in (PSEUDO_LABEL, AUTO) and _has_budget(values),
            "divides the epochs into rounds, whose number max_hours and max_usd change; give num_train_epochs alone",
        ),
    )
    return [*problems, *(f"{named} {said}." for holds, said in reasons if holds)]


def _check_frozen(method: str, named: str, changed: Mapping[str, Any]) -> list[str]:
    """Problems of keys with a head that is solved for."""
    if method not in FROZEN:
        return [
            f"{named} changes the features, and probe_solver: lbfgs freezes them; use another strategy, or align "
            f"frozen features with {' or '.join(FROZEN)}."
        ]
    return [
        f"{name}: {value!r} has no effect with probe_solver: lbfgs: what the head reads is aligned once, before the "
        "head is solved for; leave it out."
        for name, value in changed.items()
    ]


def _has_budget(values: Mapping[str, Any]) -> bool:
    return values["max_hours"] is not None or values["max_usd"] is not None


def _unread(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, whose it is) of those that have a value of their own, which the method does not read."""
    method = values[_KEY]
    of = (
        (_OF_DANN, (DANN, AUTO), "it belongs to dann"),
        (_OF_PENALTIES, (*PENALTIES, AUTO), f"it belongs to {listed(PENALTIES)}"),
        (_OF_LABELS, (PSEUDO_LABEL, AUTO), "it belongs to pseudo-label"),
    )
    for names, methods, said in of:
        if method not in methods:
            yield from ((name, said) for name in names if values[name] != _DEFAULTS[name])
    if method == AUTO and values["domain_adaptation_weight"] is not None:
        yield "domain_adaptation_weight", "each method has its own; name a method"


def check_run(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys with those of a run's data, one sentence each."""
    method, target, labels = values[_KEY], values["target_dataset_name"], values[_LABELS]
    problems = list[str]()
    if method != NONE and target is None:
        problems.append(f"{_KEY}: {method} needs target_dataset_name, the unlabeled data that the model must work on.")
    elif target is None and labels is not None:
        problems.append(f"{_LABELS}: {labels!r} has no effect without target_dataset_name, whose column it is.")
    elif method == NONE and target is not None and labels is None:
        problems.append(
            f"target_dataset_name: {target!r} has no effect without {_KEY}; set {_KEY}: auto or {listed(METHODS)}, or "
            f"{_LABELS}, to train on a few labels of it."
        )
    elif target is not None and target != IN_MEMORY and target in (values["dataset_name"], values["train_file"]):
        problems.append(f"target_dataset_name: {target!r} is the source itself, so there is nothing to adapt to.")
    if values["streaming"] and (method != NONE or labels is not None):
        problems.append(
            f"{_KEY}: {method} pairs examples by number, which a stream does not have; leave out streaming."
            if method != NONE
            else f"{_LABELS} adds examples to a training set, which streaming does not hold; leave one of them out."
        )
    if values["effort"] == "quick" and method != NONE:
        problems.append(f"{_KEY}: {method} changes the features, and effort: quick freezes them; leave out effort.")
    return problems
