"""The best linear head on frozen features: a convex problem."""

from __future__ import annotations

from dataclasses import dataclass

from .strategies import key


@dataclass
class ProbeArguments:
    """How a head is found for a frozen backbone."""

    probe_solver: str = key(
        "sgd",
        "with strategy: linear-probe, train the head in steps (sgd: by the optimizer and its rates), or solve for it "
        "(lbfgs, with the L2 penalty that validates best)",
        choices=("sgd", "lbfgs"),
    )
    head_init: str = key(
        "random",
        "with strategy: two-phase or gradual, what the head begins with: random, or probe, the solution of lbfgs on "
        "the frozen features",
        choices=("random", "probe"),
    )
