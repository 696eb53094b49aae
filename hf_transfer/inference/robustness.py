"""How much of a model's quality is left on corrupted inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_transfer.errors import UserError
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.corruptions import SEVERITIES, chance_of
from hf_transfer.evaluation.metric_table import LEADING, LOSS
from hf_transfer.evaluation.scores import Array
from hf_transfer.tasks.base import Task

Values = list[tuple[Any, ...]]


def check_robustness(task: Task) -> None:
    """Raises:
    UserError: no corruptions are known for its inputs.
    """
    if not task.corruptions:
        raise UserError(f"no corruptions are known for the inputs of {task.name}.", "Leave it out.", key="robustness")


def measure_robustness(
    task: Task,
    processor: Any,
    parts: Callable[[], Iterator[Values]],
    logits_of: Callable[[Values], Array],
    problem_type: str,
    labels: Array,
    clean: Mapping[str, float],
    limits: Array | float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics on examples with each of the task's corruptions, at three severities.

    Args:
        task: what the model reads.
        processor: of the model.
        parts: gives the examples as `logits_of` takes them, a batch at a time; it is called once per severity.
        logits_of: (examples, outputs) logits of a batch.
        problem_type: as in `transformers` configurations.
        labels: of all examples.
        clean: metrics on the examples as they are.
        limits: as in `metrics.compute`.
        seed: of all chance; an example's does not depend on its batch.

    Returns:
        `metric`, the leading one, its `clean` value and its `mean` over all corruptions and severities; `seed`; and
        `corruptions`: for each corruption and severity its `name`, `severity`, `strength`, `metrics`, `intervals`
        (95%), and `changed`, the fraction of examples that it changed at all.
    """
    metric = next(name for name in LEADING[problem_type] if name != LOSS)
    cells = [
        (name, change, severity, strength)
        for name, (change, strengths) in task.corruptions.items()
        for severity, strength in zip(SEVERITIES, strengths, strict=True)
    ]
    rows = []
    for name, change, severity, strength in tqdm(cells, desc="robustness", disable=None):
        logits, number, changed = [], 0, 0
        for values in parts():
            corrupted: Values = []
            for given in values:
                plain = task.plain(given, processor)
                other = tuple(
                    change(value, strength, chance_of(seed, name, severity, number, column))
                    for column, value in enumerate(plain)
                )
                number, changed = number + 1, changed + (not _equal(other, plain))
                corrupted.append(other)
            logits.append(logits_of(corrupted))
        measured = problem_type, np.concatenate(logits), labels
        rows.append(
            {
                "name": name,
                "severity": severity,
                "strength": strength,
                "changed": changed / max(number, 1),
                "metrics": metrics.compute(*measured, limits),
                "intervals": metrics.intervals(*measured, limits=limits),
            }
        )
    mean = float(np.mean([row["metrics"][metric] for row in rows]))
    return {"metric": metric, "clean": clean[metric], "mean": mean, "seed": seed, "corruptions": rows}


def _equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=True))
