"""Keys that watch what a model forgets while it learns something new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting


@dataclass
class WatchingArguments:
    """Data of the task that the checkpoint was trained for, evaluated with the checkpoint's own head."""

    forgetting_dataset_name: str | None = setting(
        None,
        "labeled data of the checkpoint's own task (hub id, file, folder or bundled:<name>), evaluated with its head "
        "before training and at each evaluation; never trained on (default: none)",
        resume="free",
        card="changed",
    )
    max_forgetting_samples: int | None = setting(
        None,
        "forgetting_dataset_name: maximum number of examples to evaluate on (stratified sample; default: all)",
        above=0,
        resume="free",
    )


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of the keys, among all keys of a run, one sentence each."""
    name = values["forgetting_dataset_name"]
    if name is None:
        if values["max_forgetting_samples"] is None:
            return []
        return ["max_forgetting_samples has no effect without forgetting_dataset_name; add it."]
    if values["strategy"] == "scratch" or values["from_scratch"]:
        return ["forgetting_dataset_name: training from scratch starts from random weights, which can forget nothing."]
    sharded = next((key for key in ("fsdp", "deepspeed") if values[key]), None)
    if sharded:
        return [f"forgetting_dataset_name needs the whole model in each process, which {sharded} shards; remove one."]
    return []
