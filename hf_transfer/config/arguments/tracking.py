"""What `report_to` needs, as far as it can be said before anything slow is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from hf_transfer.errors import closest

_TRACK = 'pip install "hf-transfer-toolkit[track]"'
# Trackers that are tested or documented: the packages of which one is needed, and what installs it.
TRACKERS = {
    "tensorboard": (("tensorboard", "tensorboardX"), _TRACK),
    "trackio": (("trackio",), _TRACK),
    "wandb": (("wandb",), "pip install wandb"),
}
_OTHERS = ("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow",
           "neptune", "swanlab")  # fmt: skip


def check(values: Mapping[str, Any]) -> list[str]:
    """Problems of `report_to`, among all keys of a run, one sentence each.

    A name that is like none of transformers' trackers is left to transformers, which may know it.
    """
    given = values["report_to"]
    names = [given] if isinstance(given, str) else list(given or [])
    problems = []
    for name in names:
        packages, install = TRACKERS.get(name, ((), ""))
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            problems.append(f"report_to: {packages[0]} is not installed. Install it with `{install}`.")
        elif name not in (*TRACKERS, *_OTHERS, "all", "none") and (near := closest(name, (*TRACKERS, *_OTHERS))):
            problems.append(f"report_to: there is no tracker {name!r}. Did you mean {near!r}?")
    return problems
