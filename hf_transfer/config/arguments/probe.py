"""Keys of the head's solver and its initialization."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting

SOLVERS = ("sgd", "lbfgs")
INITS = ("random", "probe")


@dataclass
class ProbeArguments:
    """How a head is found for a frozen backbone."""

    probe_solver: str = setting(
        "sgd",
        "with strategy: linear-probe, train the head with the optimizer (sgd), or solve for it (lbfgs, with the L2 "
        "penalty that is best in cross-validation)",
        choices=SOLVERS,
        resume="fixed",
        card="changed",
    )
    head_init: str = setting(
        "random",
        "with strategy: two-phase or gradual, initialize the head randomly, or with the lbfgs solution on the frozen "
        "features (probe)",
        choices=INITS,
        resume="fixed",
        card="changed",
    )
