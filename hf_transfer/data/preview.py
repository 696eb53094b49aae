"""Figures of what training sees: augmented images, or tokens, with their labels."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_transfer.data.augment import Chance, statistics
from hf_transfer.data.labels import LABELS, REGRESSION, SINGLE_LABEL, Labels
from hf_transfer.errors import UserError

_ROWS, _COLUMNS = 4, 4
_TEXTS, _WIDTH, _LINES = 8, 138, 4  # texts; characters in a line, and lines, of each
SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def check_preview(path: str) -> None:
    """Check that a figure can be written to `path`.

    Raises:
        UserError: unsupported file extension, or the folder does not exist.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"preview: unsupported file extension in {path!r}.", f"Use one of {', '.join(SUFFIXES)}.")
    if not Path(path).expanduser().parent.is_dir():
        raise UserError(f"preview: folder {str(Path(path).parent)!r} does not exist.")


def draw_preview(path: str, train: Dataset, collate: Any, processor: Any, labels: Labels, chance: Chance) -> None:
    """Write a grid of images: one row per example, one column per epoch, with the normalization undone.

    Args:
        path: where to write the figure.
        train: training split with augmentation.
        collate: the run's collator, which may apply mixup or cutmix.
        processor: image processor whose normalization is undone.
        labels: class names.
        chance: source of randomness, whose epoch is advanced from column to column.

    Raises:
        UserError: the data contains no images.
    """
    from matplotlib.figure import Figure

    rows = min(_ROWS, len(train))
    if "pixel_values" not in train[0]:
        raise UserError("preview: the data contains no images.", "Remove preview.")
    mean, std = statistics(processor)
    chosen = [int(i * (len(train) / rows)) for i in range(rows)]
    figure = Figure(figsize=(2.2 * _COLUMNS, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for column in range(_COLUMNS):
        chance.epoch = column
        batch = collate([train[i] for i in chosen])
        pixels = (batch["pixel_values"] * std + mean).clamp(0, 1)
        for row in range(rows):
            axis = axes[row][column]
            image = pixels[row].permute(1, 2, 0).squeeze(-1)
            axis.imshow(image.numpy(), cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)
            axis.set_title(f"epoch {column + 1}: {caption(batch[LABELS][row], labels)}", fontsize=8)
            axis.set_axis_off()
    chance.epoch = 0
    figure.savefig(Path(path).expanduser(), dpi=100)


def draw_batch(path: Path, train: Dataset, collate: Any, processor: Any, labels: Labels, chance: Chance) -> bool:
    """Write the figure of a run: images as `draw_preview` does, or the tokens of texts.

    Args:
        path: where to write the figure.
        train: training split with augmentation.
        collate: the run's collator.
        processor: image processor or tokenizer.
        labels: class names.
        chance: see `draw_preview`.

    Returns:
        Whether the inputs are of a kind that can be drawn.
    """
    first = train[0]
    if "pixel_values" in first:
        draw_preview(str(path), train, collate, processor, labels, chance)
        return True
    if "input_ids" not in first:
        return False
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = min(_TEXTS, len(train))
    examples = [train[i * len(train) // count] for i in range(count)]
    entries = []
    for example in examples:
        label = caption(collate([example])[LABELS][0], labels) if LABELS in example else ""
        tokens = processor.convert_ids_to_tokens(list(example["input_ids"]))
        head = textwrap.shorten(f"{label} ({len(tokens):,} tokens)", _WIDTH)
        entries.append((head, textwrap.wrap(" ".join(tokens), _WIDTH, max_lines=_LINES, placeholder=" …")))
    height = sum(len(lines) + 2 for _, lines in entries) + 1  # in lines
    with rc_context({"text.parse_math": False}):
        figure, top = Figure(figsize=(10, 0.16 * height)), 1.0
        for head, lines in entries:
            figure.text(0.02, 1 - top / height, head, fontsize=9, fontweight="bold", va="top")
            figure.text(0.02, 1 - (top + 1.1) / height, "\n".join(lines), fontsize=8, family="monospace", va="top")
            top += len(lines) + 2
        figure.savefig(path, dpi=100, format="png")
    return True


def caption(label: torch.Tensor, labels: Labels) -> str:
    """A label as text; a mixed label lists its classes with their weights."""
    if labels.problem_type == REGRESSION:
        return f"{float(label):.3g}"
    if label.ndim == 0:
        return labels.names[int(label)]
    weights = sorted(((float(w), n) for w, n in zip(label, labels.names, strict=True) if w > 0.005), reverse=True)
    if labels.problem_type != SINGLE_LABEL and all(w == 1 for w, _ in weights):
        return ", ".join(n for _, n in weights) or "none"
    return ", ".join(f"{n} {w:.0%}" for w, n in weights)
