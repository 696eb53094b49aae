"""Checks of the keys of the head's solver and the contrastive stage, against the plan and the data of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_transfer.plan.strategies import STRATEGIES

NOT_CONVEX = "its loss is not convex, and the best last layer on random hidden units is not a good head"
_BEGINS_WITH_A_HEAD = ("auto", "two-phase", "gradual")


def check(args: Any) -> list[str]:
    """Problems of the keys, one sentence each. `args` also has the keys of the plan, the adapter and the loss."""
    problems = list[str]()
    strategy = "stages" if args.stages is not None else args.strategy
    named = "no strategy" if strategy is None else "stages" if strategy == "stages" else f"strategy: {strategy}"
    is_strategy = strategy in (None, "stages", *STRATEGIES)
    if args.head_init == "probe" and is_strategy and strategy not in _BEGINS_WITH_A_HEAD:
        problems.append(f"head_init: 'probe' has no effect with {named}; it is for two-phase and gradual.")
    if args.contrastive_epochs and strategy in (None, "linear-probe"):
        problems.append(
            f"contrastive_epochs: {args.contrastive_epochs!r} has no effect with {named}: it trains what the plan "
            "trains below the head; use strategy: auto, two-phase, gradual, partial or full."
        )
    if args.refit is True and args.probe_solver != "lbfgs" and strategy == "linear-probe":
        problems.append(
            "refit: true has no effect with strategy: linear-probe and probe_solver: sgd; use probe_solver: lbfgs."
        )
    if args.probe_solver != "lbfgs":
        return problems
    if is_strategy and strategy != "linear-probe":
        problems.append(f"probe_solver: 'lbfgs' has no effect with {named}; it is for linear-probe.")
    if args.adapter not in (None, "none"):
        problems.append("probe_solver: 'lbfgs' solves for a head on fixed features, which an adapter would change.")
    problems += [
        f"probe_solver: 'lbfgs' cannot be combined with {name}, which leaves no convex problem; leave it out, or use "
        "probe_solver: sgd."
        for name in ("focal_gamma", "label_smoothing_factor", "balanced_sampling")
        if getattr(args, name)
    ]
    return problems


def check_run(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys of a run's data, one sentence each: features and labels must be the same every time."""
    mixes = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "streaming": False}
    augments = {**mixes, "augmentation": "none", "random_erasing": None, "token_masking": 0.0}
    solves = values["probe_solver"] == "lbfgs"
    problems = _contrastive(values, mixes) if values["contrastive_epochs"] else []
    if not solves and values["head_init"] != "probe":
        return problems
    named, refused = ("probe_solver: 'lbfgs'", augments) if solves else ("head_init: 'probe'", mixes)
    is_mlp = values["head"] == "mlp"
    return [
        *problems,
        *([f"{named} cannot be combined with head: mlp: {NOT_CONVEX}."] if is_mlp else []),
        *_live(named, refused, values, solves),
    ]


def _contrastive(values: Mapping[str, Any], mixes: Mapping[str, Any]) -> list[str]:
    """What a contrastive stage cannot be combined with; one sentence each."""
    named = f"contrastive_epochs: {values['contrastive_epochs']!r}"
    problems = [
        f"{named} needs all examples and their own labels, which {name} does not give; leave one of them out."
        for name, off in mixes.items()
        if values[name] not in (off, 0.0)
    ]
    if values["head"] == "mlp":
        problems.append(
            f"{named} cannot be combined with head: mlp: its hidden units would be drawn together, not the features."
        )
    return problems


def _live(named: str, refused: Mapping[str, Any], values: Mapping[str, Any], solves: bool) -> list[str]:
    """One sentence for each key that changes features or labels while they are used."""
    return [
        f"{named} needs the same features and labels every time, which {name} changes; leave it out, or use "
        f"{'probe_solver: sgd' if solves else 'head_init: random'}."
        for name, off in refused.items()
        if values[name] not in (off, 0.0)
    ]
