"""Keys of weight averaging while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting


@dataclass
class AveragingArguments:
    """An exponential moving average of the weights, as `training.ema` keeps it."""

    ema_decay: float | None = setting(
        None,
        "evaluate and save an exponential moving average of the weights: the fraction of it that each optimizer step "
        "keeps, such as 0.999; lower in the first steps (default: none)",
        above=0,
        below=1,
        resume="fixed",
        card="changed",
    )


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the key, among all keys of training, one sentence each."""
    if values["ema_decay"] is None:
        return []
    if values["probe_solver"] == "lbfgs":
        return [
            "ema_decay averages over optimizer steps, and probe_solver: lbfgs solves for the head without any; remove "
            "ema_decay."
        ]
    if values["adapter"] == "adalora":
        return [
            "ema_decay: adalora removes ranks while it trains, and an average over other ranks is no adapter; use "
            "adapter: lora."
        ]
    sharded = next((name for name in ("fsdp", "deepspeed") if values[name]), None)
    return [_sharded(sharded)] if sharded else []


def _sharded(key: str) -> str:
    return (
        f"ema_decay keeps a second copy of the weights, which {'DeepSpeed' if key == 'deepspeed' else 'FSDP'} shards; "
        f"remove {key} (plain data parallelism works), or remove ema_decay."
    )
