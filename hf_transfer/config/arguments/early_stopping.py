"""Keys of early stopping."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting


@dataclass
class EarlyStoppingArguments:
    """When a run ends before its last epoch, as transformers' `EarlyStoppingCallback` decides it."""

    early_stopping_patience: int | None = setting(
        None,
        "end training after this many evaluations without improvement of metric_for_best_model (default: never)",
        above=0,
        resume="free",
        card="changed",
    )
    early_stopping_threshold: float = setting(
        0.0,
        "early_stopping_patience: smallest difference to the best value that counts as an improvement",
        minimum=0,
        resume="free",
        card="changed",
    )


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys, among all keys of training, one sentence each."""
    if values["early_stopping_patience"] is None:
        if not values["early_stopping_threshold"]:
            return []
        return ["early_stopping_threshold has no effect without early_stopping_patience; add it, e.g. 3."]
    if _strategy(values, "eval_strategy") == "no":
        return [
            "early_stopping_patience counts evaluations, and eval_strategy: no makes none; set eval_strategy: epoch "
            "or steps."
        ]
    return []


def check_run(values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Keys of a run that leave no checkpoint of the best evaluation; a sentence each.

    Args:
        values: every key with its value.
        given: the keys that were given.
    """
    saves, evaluates = _strategy(values, "save_strategy"), _strategy(values, "eval_strategy")
    keeps_best = values["early_stopping_patience"] is not None and "load_best_model_at_end" not in given
    if not keeps_best or evaluates == "no" or "save_strategy" not in given or saves in (evaluates, "best"):
        return []
    return [
        f"early_stopping_patience keeps the weights of the best evaluation, and save_strategy: {saves} does not save "
        f"where eval_strategy: {evaluates} evaluates; leave save_strategy out, or add load_best_model_at_end: false to "
        "keep the last weights."
    ]


def implied(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """What a run that ends early sets of the keys that were not given, so that its best weights are kept.

    Args:
        values: every key with its value.
        given: the keys that were given.
    """
    if values["early_stopping_patience"] is None or "load_best_model_at_end" in given:
        return {}
    wanted: dict[str, Any] = {"load_best_model_at_end": True}
    evaluates = _strategy(values, "eval_strategy")
    if evaluates == "steps":
        wanted |= {"save_strategy": evaluates, "save_steps": values["eval_steps"] or values["logging_steps"]}
    return {name: value for name, value in wanted.items() if name not in given}


def _strategy(values: Mapping[str, Any], name: str) -> str:
    return str(getattr(values[name], "value", values[name]))
