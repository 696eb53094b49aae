"""Keys of batches by length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting


@dataclass
class BucketingArguments:
    """How examples are put into batches."""

    length_bucketing: bool | str = setting(
        False,
        "batch texts of similar length together, to avoid padding; auto: if their lengths differ enough",
        choices=("auto", "true", "false"),
        resume="fixed",
        card="changed",
    )


def check(values: Mapping[str, Any]) -> list[str]:
    """Keys, among all of a run, that decide the order of examples as `length_bucketing` does; a sentence each."""
    if values["length_bucketing"] is not True:  # `auto` gives way
        return []
    return [
        f"length_bucketing and {other} contradict each other: each decides the order of examples. Keep one."
        for other in other_orders(values)
    ]


def other_orders(values: Mapping[str, Any]) -> list[str]:
    """Keys that decide the order of examples, other than `length_bucketing`, as they are written."""
    others = []
    if values["train_sampling_strategy"] != "random":
        others.append(f"train_sampling_strategy: {values['train_sampling_strategy']}")
    if values["balanced_sampling"]:
        others.append("balanced_sampling")
    return others
