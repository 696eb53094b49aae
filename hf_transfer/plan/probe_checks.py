"""Checks of the keys of the head's solver, against the plan, the loss and the data of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_transfer.plan.strategies import STRATEGIES

NOT_CONVEX = "its loss is not convex, and the best last layer on random hidden units is not a good head"
_BEGINS_WITH_A_HEAD = ("auto", "two-phase", "gradual")


def check(args: Any) -> list[str]:
    """Problems of the keys, one sentence each. `args` also has the keys of the plan, the adapter and the loss."""
    problems = []
    strategy = "stages" if args.stages is not None else args.strategy
    named = "no strategy" if strategy is None else "stages" if strategy == "stages" else f"strategy: {strategy}"
    is_strategy = strategy in (None, "stages", *STRATEGIES)
    if args.head_init == "probe" and is_strategy and strategy not in _BEGINS_WITH_A_HEAD:
        problems.append(f"head_init: 'probe' has no effect with {named}; it is for two-phase and gradual.")
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
    if not solves and values["head_init"] != "probe":
        return []
    named, refused = ("probe_solver: 'lbfgs'", augments) if solves else ("head_init: 'probe'", mixes)
    is_mlp = values["head"] == "mlp"
    return [
        *([f"{named} cannot be combined with head: mlp: {NOT_CONVEX}."] if is_mlp else []),
        *_live(named, refused, values, solves),
    ]


def _live(named: str, refused: Mapping[str, Any], values: Mapping[str, Any], solves: bool) -> list[str]:
    """One sentence for each key that changes features or labels while they are used."""
    return [
        f"{named} needs the same features and labels every time, which {name} changes; leave it out, or use "
        f"{'probe_solver: sgd' if solves else 'head_init: random'}."
        for name, off in refused.items()
        if values[name] not in (off, 0.0)
    ]
