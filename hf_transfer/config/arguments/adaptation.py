"""Keys of domain adaptation: a labeled source, an unlabeled target, and what draws their features together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting

NONE, MMD, CORAL, DANN = "none", "mmd", "coral", "dann"
LINEAR_OT = "linear-ot"
METHODS = (MMD, CORAL, DANN)
FROZEN = (CORAL, LINEAR_OT)  # methods on frozen features, before a head is solved for
RAMP, CONSTANT = "ramp", "constant"
IN_MEMORY = "in memory"  # what the key of data that was passed as a Python object holds
_KEY = "domain_adaptation"
_DEFAULTS: dict[str, Any] = {
    "domain_adaptation_weight": 1.0,
    "domain_adaptation_layer": None,
    "domain_adaptation_schedule": RAMP,
    "discriminator_learning_rate": 1e-3,
}


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
        "label column of the target, for the few examples of it that are labeled and trained on (blank: unlabeled); of "
        "an image folder, the class folders (default: labels of the target are ignored)",
        topic="domain adaptation",
        resume="fixed",
    )
    target_in_memory: Any = setting(None, "target_dataset_name as a Python object, from `fine_tune`", resume="free")


@dataclass
class AdaptationArguments:
    """How the features of source and target are drawn together."""

    domain_adaptation: str = setting(
        NONE,
        "penalty that draws the features of source and target together: mmd (kernel distance), coral (covariances) or "
        "dann (a discriminator that the backbone learns to deceive); with probe_solver: lbfgs, the map of frozen "
        "features from source to target: coral or linear-ot (optimal transport)",
        choices=(NONE, *METHODS, LINEAR_OT),
        topic="domain adaptation",
        resume="fixed",
        card="changed",
    )
    domain_adaptation_weight: float = setting(
        1.0,
        "weight of the penalty next to the loss of the source",
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


def aligns_frozen(args: Any) -> bool:
    """Whether frozen features are aligned before a head is solved for; `args` also has the keys of the probe."""
    return args.domain_adaptation in FROZEN and args.probe_solver == "lbfgs"


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys among themselves and with those of the training, one sentence each."""
    method = values[_KEY]
    changed = {name: values[name] for name, default in _DEFAULTS.items() if values[name] != default}
    if method == NONE:
        return [
            f"{name}: {value!r} has no effect without {_KEY}; set {_KEY}: {DANN}, {MMD} or {CORAL}."
            for name, value in changed.items()
        ]
    named, problems = f"{_KEY}: {method}", list[str]()
    if values["probe_solver"] == "lbfgs":
        return _check_frozen(method, named, changed)
    rate = values["discriminator_learning_rate"]
    if method != DANN and rate != _DEFAULTS["discriminator_learning_rate"]:
        problems.append(f"discriminator_learning_rate: {rate!r} has no effect with {named}; it belongs to {DANN}.")
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
            values["torch_compile"],
            "reads the features inside the model, where torch_compile leaves no place; leave torch_compile out",
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


def check_run(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys with those of a run's data, one sentence each."""
    method, target = values[_KEY], values["target_dataset_name"]
    if method == NONE:
        if target is None:
            labels = values["target_label_column_name"]
            said = (
                f"target_label_column_name: {labels!r} has no effect without target_dataset_name, whose column it is."
            )
            return [said] if labels is not None else []
        return [f"target_dataset_name: {target!r} has no effect without {_KEY}; set {_KEY}: {DANN}, {MMD} or {CORAL}."]
    problems = list[str]()
    if target is None:
        problems.append(f"{_KEY}: {method} needs target_dataset_name, the unlabeled data that the model must work on.")
    elif target != IN_MEMORY and target in (values["dataset_name"], values["train_file"]):
        problems.append(f"target_dataset_name: {target!r} is the source itself, so there is nothing to adapt to.")
    if values["streaming"]:
        problems.append(
            f"{_KEY}: {method} pairs examples by number, which a stream does not have; leave out streaming."
        )
    if values["effort"] == "quick":
        problems.append(f"{_KEY}: {method} changes the features, and effort: quick freezes them; leave out effort.")
    return problems
