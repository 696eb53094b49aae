"""Keys of the head's solver, its initialization, and the contrastive stage before both."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting

SOLVERS = ("sgd", "lbfgs")
INITS = ("random", "probe")


@dataclass
class ProbeArguments:
    """How a head is found, and what may precede it."""

    probe_solver: str = setting(
        "sgd",
        "with strategy: linear-probe, train the head with the optimizer (sgd), or solve for it (lbfgs, with the L2 "
        "penalty that is best in cross-validation)",
        choices=SOLVERS,
        resume="fixed",
        card="changed",
    )
    refit: bool | str = setting(
        False,
        "once the validation split, drawn from the training data, is measured, learn from it too: with probe_solver: "
        "lbfgs solve for the head again on all examples; else repeat the training with other parts held out and save "
        "the mean of the weights. auto: the former",
        choices=("auto", "true", "false"),
        resume="free",
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
    contrastive_epochs: float = setting(
        0.0,
        "epochs of a stage that comes first and draws examples of one class together, with the supervised contrastive "
        "loss on what the head reads; 0 for none",
        minimum=0,
        resume="fixed",
        card="changed",
    )
