"""`mistakes.json`: what a report shows of the first rows of `errors.csv` and that table cannot hold.

A list with an entry per row: `picture`, a small picture as a data URL (None of texts, and where it cannot be read), and
`nearest`, the nearest training examples: their `place`, `label`, `cosine`, and `picture` or `text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_transfer.data.images import data_url, undecoded
from hf_transfer.errors import shortened
from hf_transfer.files import write_json
from hf_transfer.report.run_files import MOST_ROWS
from hf_transfer.run_folder import MISTAKES
from hf_transfer.runs.neighbors import Nearest
from hf_transfer.runs.prepare import Prepared
from hf_transfer.tasks.image_classification import range_of

SIDE, SMALL_SIDE = 192, 96  # most pixels per side of a picture, and of those of the nearest training examples
_LENGTH = 300  # characters of a text


def write_mistakes(prepared: Prepared, nearest: Nearest, split: str, positions: Sequence[int], folder: Path) -> None:
    """Write it, for the first `MOST_ROWS` wrong answers.

    Args:
        prepared: the run's data.
        nearest: training examples, if they were looked for.
        split: that the answers are of.
        positions: of the wrong answers in the split.
        folder: of the run.
    """
    shown = list(positions[:MOST_ROWS])
    pictures = _inputs(prepared, split, shown, SIDE)
    near = _nearest(prepared, nearest, shown)
    entries = [{"picture": own.get("picture"), "nearest": others} for own, others in zip(pictures, near, strict=True)]
    write_json(folder / MISTAKES, entries)


def _nearest(prepared: Prepared, nearest: Nearest, positions: Sequence[int]) -> list[list[dict[str, Any]]]:
    """The nearest training examples of each example."""
    if nearest.found is None or not positions:
        return [[] for _ in positions]
    places, labels = nearest.named(prepared, positions)
    rows, cosines = (values[list(positions)].tolist() for values in (nearest.found.rows, nearest.found.cosines))
    unique = sorted(places)
    inputs = dict(zip(unique, _inputs(prepared, "train", unique, SMALL_SIDE), strict=True))
    return [
        [
            {"place": places[row], "label": labels[row], "cosine": round(cosine, 4), **inputs[row]}
            for row, cosine in zip(own, near, strict=True)
        ]
        for own, near in zip(rows, cosines, strict=True)
    ]


def _inputs(prepared: Prepared, split: str, positions: Sequence[int], side: int) -> list[dict[str, Any]]:
    """`picture` or `text` of examples of a split."""
    columns = prepared.data.inputs
    rows = undecoded(prepared.data.splits[split].select(positions), columns)
    cells = list(zip(*(rows[column][:] for column in columns), strict=True))
    return [
        {"text": " / ".join(shortened(part, _LENGTH) for part in cell)}
        if all(isinstance(part, str) for part in cell)
        else {"picture": data_url(cell[0], side, range_of(prepared.processor))}
        for cell in cells
    ]
