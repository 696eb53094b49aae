"""A picture of what training will see: examples as augmentation changes them, with their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_transfer.data.augment import Chance, statistics
from hf_transfer.data.labels import LABELS, REGRESSION, SINGLE_LABEL, Labels
from hf_transfer.errors import UserError

_ROWS, _COLUMNS = 4, 4
SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def check_preview(path: str) -> None:
    """Raises:
    UserError: no picture can be written there.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"preview: {path!r} is no picture.", f"Name a {', '.join(SUFFIXES)} file.")
    if not Path(path).expanduser().parent.is_dir():
        raise UserError(f"preview: there is no folder {str(Path(path).parent)!r}.")


def draw_preview(path: str, train: Dataset, collate: Any, processor: Any, labels: Labels, chance: Chance) -> None:
    """Write a grid: a row per example, the same example in as many epochs as there are columns, de-normalised.

    Args:
        path: the picture's.
        train: the training split with its random changes.
        collate: the run's collator, which may mix examples.
        processor: whose statistics are undone.
        labels: their names.
        chance: whose epoch is moved.

    Raises:
        UserError: the data holds no images.
    """
    from matplotlib.figure import Figure

    rows = min(_ROWS, len(train))
    if "pixel_values" not in train[0]:
        raise UserError("preview: the data holds no images.", "Leave preview out.")
    mean, std = statistics(processor)
    picked = [int(i * (len(train) / rows)) for i in range(rows)]
    figure = Figure(figsize=(2.2 * _COLUMNS, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for column in range(_COLUMNS):
        chance.epoch = column
        batch = collate([train[i] for i in picked])
        pixels = (batch["pixel_values"] * std + mean).clamp(0, 1)
        for row in range(rows):
            axis = axes[row][column]
            picture = pixels[row].permute(1, 2, 0).squeeze(-1)
            axis.imshow(picture.numpy(), cmap="gray" if picture.ndim == 2 else None, vmin=0, vmax=1)
            axis.set_title(f"epoch {column + 1}: {caption(batch[LABELS][row], labels)}", fontsize=8)
            axis.set_axis_off()
    chance.epoch = 0
    figure.savefig(Path(path).expanduser(), dpi=100)


def caption(label: torch.Tensor, labels: Labels) -> str:
    """A label as a person reads it, also one that is shared by several classes."""
    if labels.problem_type == REGRESSION:
        return f"{float(label):.3g}"
    if label.ndim == 0:
        return labels.names[int(label)]
    shares = sorted(((float(s), n) for s, n in zip(label, labels.names, strict=True) if s > 0.005), reverse=True)
    if labels.problem_type != SINGLE_LABEL and all(s == 1 for s, _ in shares):
        return ", ".join(n for _, n in shares) or "none"
    return ", ".join(f"{n} {s:.0%}" for s, n in shares)
