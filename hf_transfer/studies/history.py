"""What the history of a run says of its course: the metric after each epoch, and the training loss at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_transfer.run_folder import HISTORY

WHOLE = 1e-3  # epochs


def by_epoch(folder: Path, metric: str) -> dict[int, float]:
    """The metric after whole epochs, by epoch; empty without a history.

    Args:
        folder: of the run.
        metric: of the validation split.
    """
    found: dict[int, float] = {}
    for entry in _entries(folder):
        epoch, value = entry.get("epoch"), entry.get(f"eval_{metric}")
        if epoch is None or value is None or round(epoch) < 1 or abs(epoch - round(epoch)) > WHOLE:
            continue
        if math.isfinite(value):
            found[round(epoch)] = float(value)
    return found


def last_training_loss(folder: Path) -> float | None:
    """The mean training loss of the last epoch, dropout and augmentation included; None where none was logged in it.

    Args:
        folder: of the run.
    """
    logs = [one for one in _entries(folder) if "loss" in one and one.get("epoch") is not None]
    if not logs:
        return None
    begin = math.ceil(logs[-1]["epoch"] - WHOLE) - 1
    total, steps, before = 0.0, 0, 0
    for one in logs:
        if one["epoch"] > begin + WHOLE:
            total += one["loss"] * (one["step"] - before)
            steps += one["step"] - before
        before = one["step"]
    return total / steps if steps and math.isfinite(total) else None


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / HISTORY
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:  # a last line that a kill cut off
            return
