"""Which of several pretrained models suits the data: by heads on their frozen features, in cross-validation.

All models are asked about the same examples in the same folds, so that they are compared example by example. The mean
loss of held-out examples decides, which is steadier than the number of right answers. What fine-tuning adds later is
not seen: a model whose features are behind may still catch up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hf_transfer.analysis.expected import best_layer
from hf_transfer.analysis.logme import logme
from hf_transfer.features.convex_head import SINGLE
from hf_transfer.features.cross_validation import divisions, held_out_logits

_CLEAR = 2.0  # standard errors of the paired difference, from which on a model is behind


@dataclass(frozen=True)
class Answers:
    """What the best head on a model's frozen features says of held-out examples.

    Attributes:
        layer: whose features are read.
        right: (examples,) whether the most probable class is right.
        loss: mean loss.
        logme: of the features; see `analysis.logme`.
    """

    layer: str
    right: torch.Tensor
    loss: float
    logme: float


@dataclass(frozen=True)
class Row:
    """A model.

    Attributes:
        model: its name.
        parameters: number of all its parameters, head included; None if it could not be loaded.
        imagenet: top-1 accuracy on ImageNet; None if it is not known here.
        answers: None if there are none.
        seconds: of the pass through the frozen model, for 1,000 examples on this machine.
        why_not: why there are no answers, as a sentence; empty if there are.
    """

    model: str
    parameters: int | None = None
    imagenet: float | None = None
    answers: Answers | None = None
    seconds: float | None = None
    why_not: str = ""

    @property
    def refusal(self) -> str:
        """The model and why it has no answers; errors of bundled models begin with the name."""
        return self.why_not if self.why_not.startswith(self.model) else f"{self.model}: {self.why_not}"

    def to_dict(self, best: Answers | None) -> dict[str, Any]:
        """For JSON, compared with the best."""
        rest = {name: value for name, value in asdict(self).items() if name != "answers"}
        if self.answers is None or best is None:
            return {**rest, "layer": None, "accuracy": None, "loss": None, "logme": None, "is_behind": None}
        return {
            **rest,
            "layer": self.answers.layer,
            "accuracy": float(self.answers.right.double().mean()),
            "loss": self.answers.loss,
            "logme": self.answers.logme,
            "is_behind": is_behind(self.answers, best),
        }


@dataclass(frozen=True)
class Ranking:
    """Models, the best first; at the end those that have no answers.

    Attributes:
        rows: of the models.
        looked_at: number of training examples that the models saw.
        classes: of the data.
    """

    rows: tuple[Row, ...] = field(default=())
    looked_at: int = 0
    classes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        best = self.rows[0].answers
        return {
            "models": [row.to_dict(best) for row in self.rows],
            "looked_at": self.looked_at,
            "classes": self.classes,
            "largest": _first(self.rows, "parameters"),
            "best_on_imagenet": _first(self.rows, "imagenet"),
        }

    def lines(self) -> list[str]:
        """For display."""
        best = self.rows[0].answers
        head = ("model", "accuracy", "loss", "LogME", "layer", "parameters", "s per 1,000", "ImageNet")
        cells = [_cells(row, best) for row in self.rows if row.answers is not None]
        widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
        table = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *cells]]
        lines = [
            f"Heads on the frozen features of {self.looked_at:,} training examples, {self.classes:,} classes, in "
            "cross-validation; the lowest loss first:",
            *table,
            *(row.refusal for row in self.rows if row.answers is None),
        ]
        level = [r.model for r in self.rows[1:] if r.answers and best and not is_behind(r.answers, best)]
        if level:
            lines.append(f"Not clearly behind {self.rows[0].model}: {', '.join(level)}.")
        if (largest := _first(self.rows, "parameters")) and len(cells) > 1:
            known = _first(self.rows, "imagenet")
            by_imagenet = f", and by its accuracy on ImageNet {known}" if known else ""
            lines.append(f"By its size alone one would take {largest}{by_imagenet}.")
        return [*lines, "What fine-tuning adds is not seen here: compare close ones by runs."]


def answers_of(features: Mapping[str, torch.Tensor], labels: torch.Tensor, outputs: int, seed: int) -> Answers:
    """What the best head on frozen features says of held-out examples.

    Args:
        features: (examples, width) of each layer.
        labels: (examples,) classes.
        outputs: number of classes.
        seed: of the folds, which depend on the labels alone.
    """
    layer, loss, l2 = best_layer(features, labels, outputs, seed)
    draws = divisions(SINGLE, labels, 1, seed)
    (logits,) = held_out_logits(SINGLE, features[layer], labels, outputs, draws, [l2])
    return Answers(layer, logits[0].argmax(1) == labels, loss, logme(features[layer], labels, outputs))


def ranked(rows: Sequence[Row], looked_at: int, classes: int) -> Ranking:
    """The models in order."""
    order = sorted(rows, key=lambda row: math.inf if row.answers is None else row.answers.loss)
    return Ranking(tuple(order), looked_at, classes)


def is_behind(one: Answers, best: Answers) -> bool:
    """Whether fewer held-out examples are right, by more than chance explains: paired, example by example."""
    difference = best.right.double() - one.right.double()
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) > _CLEAR * error


def _first(rows: Sequence[Row], what: str) -> str | None:
    """Name of the usable model with the highest value; None if fewer than two values are known."""
    known = [row for row in rows if row.answers is not None and getattr(row, what) is not None]
    return max(known, key=lambda row: getattr(row, what)).model if len(known) > 1 else None


def _cells(row: Row, best: Answers | None) -> tuple[str, ...]:
    found = row.to_dict(best)
    return (
        row.model,
        f"{found['accuracy']:.3f}",
        f"{found['loss']:.3f}",
        f"{found['logme']:.3f}",
        found["layer"],
        f"{row.parameters:,}",
        f"{row.seconds:.1f}",
        "unknown" if row.imagenet is None else f"{row.imagenet:.3f}",
    )
