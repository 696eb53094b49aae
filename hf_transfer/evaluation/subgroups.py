"""Metrics of the examples that share a value of a column."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hf_transfer.errors import UserError, listed, nearest
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.scores import Array

MOST_GROUPS = 50  # values of a column


def check_column(name: str, columns: Sequence[str]) -> None:
    """Raises:
    UserError: the data has no such column.
    """
    if name not in columns:
        raise UserError(
            f"the data has no column {name!r}.", f"It has {listed(columns, 20)}.{nearest(name, columns)}", key="by"
        )


def groups_of(name: str, values: Sequence[Any]) -> dict[Any, Array]:
    """The positions of the examples of each value of a column, the values in order; None, a missing one, last.

    Args:
        name: of the column.
        values: (examples,) of it; NaN counts as missing.

    Raises:
        UserError: it has lists or other values that are no names and no numbers, or too many of them.
    """
    rows: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        is_missing = value is None or (isinstance(value, float) and math.isnan(value))
        if not is_missing and not isinstance(value, str | int | float):
            raise UserError(
                f"column {name!r} contains {type(value).__name__}s.", "Name a column of words or numbers.", key="by"
            )
        rows.setdefault(None if is_missing else value, []).append(i)
    if len(rows) > MOST_GROUPS:
        raise UserError(
            f"column {name!r} has {len(rows):,} different values; {MOST_GROUPS} at most are told apart.",
            "Name a column of groups; of a number, make one of ranges.",
            key="by",
        )
    order = sorted(rows, key=lambda value: (value is None, isinstance(value, str), value if value is not None else 0))
    return {value: np.array(rows[value]) for value in order}


def measure_groups(
    problem_type: str, logits: Array, labels: Array, groups: Mapping[Any, Array], limits: Array | float = 0.0
) -> Iterator[dict[str, Any]]:
    """`value`, `num_examples`, `metrics` and `intervals` (95%) of each group.

    Args:
        problem_type: as in `transformers` configurations.
        logits: (examples, outputs).
        labels: as in `metrics.compute`.
        groups: of `groups_of`.
        limits: as in `metrics.compute`.
    """
    for value, rows in groups.items():
        own = problem_type, logits[rows], labels[rows]
        yield {
            "value": value,
            "num_examples": len(rows),
            "metrics": metrics.compute(*own, limits),
            "intervals": metrics.intervals(*own, limits=limits),
        }
