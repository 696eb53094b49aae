"""optuna as what it is here: it proposes the values of the next trial, and tells a hopeless one.

The study lives in memory and is built again from the trials so far whenever something is asked, with a sampler that is
seeded for this one question. So a search that goes on proposes what an uninterrupted one would have, and no state of
optuna has to be kept. Sampler: TPE (Bergstra et al. 2011); pruner: the median rule (Golovin et al. 2017).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_transfer.studies.space import Choices, Range, Space, count_of

RANDOM = 5  # first trials, which are drawn at random
JUDGES = 5  # trials that have ended before another is judged by them
_MOST_LISTED = 10_000


@dataclass(frozen=True)
class Told:
    """What is known of a trial.

    Attributes:
        settings: values by key.
        value: the metric in the end; None of a trial that failed or was stopped.
        by_epoch: the metric after whole epochs.
        is_stopped: whether it was stopped early.
    """

    settings: Mapping[str, Any]
    value: float | None = None
    by_epoch: Mapping[int, float] = field(default_factory=dict)
    is_stopped: bool = False


def propose(space: Space, earlier: Sequence[Told], greater_is_better: bool, seed: int) -> dict[str, Any] | None:
    """Values for the next trial, other than those of all earlier ones; None where all have been tried.

    Args:
        space: what each key may be.
        earlier: trials, in order.
        greater_is_better: of the metric.
        seed: of the search.
    """
    number = len(earlier)
    entropy = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    study = _study(space, earlier, greater_is_better, entropy)
    drawn = _quietly(study.ask, _distributions(space)).params
    found = {name: one.tidy(_value(one, drawn[name])) for name, one in space.items()}
    if found not in [dict(one.settings) for one in earlier]:
        return found
    return _unseen(space, [dict(one.settings) for one in earlier], entropy)


def is_hopeless(space: Space, earlier: Sequence[Told], running: Told, greater_is_better: bool) -> bool:
    """Whether a running trial is worse than the median of the earlier ones after as many epochs.

    Args:
        space: what each key may be.
        earlier: trials, in order.
        running: with its metric so far.
        greater_is_better: of the metric.
    """
    study = _study(space, earlier, greater_is_better, 0)
    study.enqueue_trial(_params(space, running.settings))
    trial = _quietly(study.ask, _distributions(space))
    for epoch, value in running.by_epoch.items():
        trial.report(value, epoch)
    return bool(trial.should_prune())


def _study(space: Space, earlier: Sequence[Told], greater_is_better: bool, seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _quietly(
        optuna.create_study,
        direction="maximize" if greater_is_better else "minimize",
        sampler=_quietly(optuna.samplers.TPESampler, seed=seed, n_startup_trials=RANDOM),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=JUDGES),
    )
    states, distributions = optuna.trial.TrialState, _distributions(space)
    for one in earlier:
        state = states.PRUNED if one.is_stopped else states.FAIL if one.value is None else states.COMPLETE
        last = list(one.by_epoch.values())[-1:] if one.is_stopped else []
        value = one.value if state is states.COMPLETE else last[0] if last else None
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=_params(space, one.settings),
                distributions=distributions,
                intermediate_values=dict(one.by_epoch),
            )
        )
    return study


def _distributions(space: Space) -> dict[str, Any]:
    import optuna

    found: dict[str, Any] = {}
    for name, one in space.items():
        if isinstance(one, Choices):  # by number, since optuna takes no lists and mappings
            found[name] = optuna.distributions.CategoricalDistribution(list(range(len(one.values))))
        elif one.is_int:
            found[name] = optuna.distributions.IntDistribution(int(one.low), int(one.high), log=one.is_log)
        else:
            found[name] = optuna.distributions.FloatDistribution(one.low, one.high, log=one.is_log)
    return found


def _params(space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values as optuna knows them."""
    return {
        name: one.values.index(settings[name]) if isinstance(one, Choices) else settings[name]
        for name, one in space.items()
    }


def _value(one: Range | Choices, drawn: Any) -> Any:
    return one.values[drawn] if isinstance(one, Choices) else drawn


def _unseen(space: Space, seen: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any] | None:
    """Any combination that has not been tried; None if there is none, or they are too many to list."""
    if count_of(space) > _MOST_LISTED:
        return None
    values = [
        one.values if isinstance(one, Choices) else range(int(one.low), int(one.high) + 1) for one in space.values()
    ]
    combinations = (dict(zip(space, drawn, strict=True)) for drawn in itertools.product(*values))
    left = [settings for settings in combinations if settings not in seen]
    return left[int(np.random.default_rng(seed).integers(len(left)))] if left else None


def _quietly(call: Any, *args: Any, **keys: Any) -> Any:
    """Without optuna's notes on what may change in its later releases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **keys)
