"""How long a run would take on this machine, and what it would cost, without training."""

from __future__ import annotations

import time
from dataclasses import dataclass

from transformers import set_seed

from hf_transfer.config.arguments.adaptation import DANN, METHODS, NONE
from hf_transfer.runs import adaptation_choice
from hf_transfer.runs.choosing import choose
from hf_transfer.runs.decisions import with_decisions
from hf_transfer.runs.machine import quiet_libraries
from hf_transfer.runs.prepare import make_trainer, prepare, prepare_splits
from hf_transfer.runs.pricing import price_here, with_price
from hf_transfer.runs.shared import Shared
from hf_transfer.settings import Config


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        preparing: seconds before the first step, as they were just measured: reading, loading, choosing.
        training: seconds of training, from a timed batch of each stage; None where that is not known (a stream, a head
            that is solved for).
        usd_per_hour: of the devices together; None if their price is not known.
    """

    preparing: float
    training: float | None
    usd_per_hour: float | None

    @property
    def seconds(self) -> float:
        return self.preparing + (self.training or 0.0)


def estimate(config: Config, among: Shared | None = None) -> Estimate:
    """Prepare a run, time a batch of each stage, and train nothing.

    Args:
        config: the keys; its output folder is created.
        among: of several runs, what they share.

    Raises:
        UserError: as `run` does before it trains.
    """
    if adaptation_choice.is_asked(config):
        return _of_candidates(config, among)
    began = time.perf_counter()
    set_seed(config.training.seed)
    config = with_price(with_decisions(config, {"push_to_hub": False}))
    with quiet_libraries(config.training):
        prepared = choose(prepare(config, among), is_one_of_several=among is not None)
        splits = prepare_splits(prepared)
        trainer = make_trainer(prepared, splits["train"], splits["validation"])
        preparing = time.perf_counter() - began
        args, seconds = trainer.args, trainer.time_budget.expected()
    price = price_here(prepared.config.training, args.device.type)
    return Estimate(preparing, seconds, None if price is None else price * args.world_size)


def _of_candidates(config: Config, among: Shared | None) -> Estimate:
    """All candidates of `domain_adaptation: auto`: one on the source alone, the others as long as the longest."""
    shared = adaptation_choice.shared_by_candidates(among)
    alone, paired = (estimate(adaptation_choice.candidate(config, one), shared) for one in (NONE, DANN))
    count, training = len(METHODS), None
    if alone.training is not None and paired.training is not None:
        training = alone.training + count * paired.training
    return Estimate(alone.preparing + count * paired.preparing, training, alone.usd_per_hour)
