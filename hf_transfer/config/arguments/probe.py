"""Keys of the head's solver and its initialization."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import key

SOLVERS = ("sgd", "lbfgs")
INITS = ("random", "probe")


@dataclass
class ProbeArguments:
    """How a head is found for a frozen backbone."""

    probe_solver: str = key(
        "sgd",
        "with strategy: linear-probe, train the head in steps (sgd: by the optimizer and its rates), or solve for it "
        "(lbfgs, with the L2 penalty that validates best)",
        choices=SOLVERS,
    )
    head_init: str = key(
        "random",
        "with strategy: two-phase or gradual, what the head begins with: random, or probe, the solution of lbfgs on "
        "the frozen features",
        choices=INITS,
    )
