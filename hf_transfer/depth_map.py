"""What a plan does to each layer group, as a table, as data and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .layers import LayerGroup
from .plan import Plan

PICTURES = (".png", ".svg", ".pdf")
MOST_MODULES = 4
SOME = "*"  # marks a rate that not all of a group's parameters have


@dataclass(frozen=True)
class Row:
    """One layer group under a plan.

    Attributes:
        name: of the group.
        modules: its parts.
        num_parameters: its scalars.
        rates: for each stage, the distinct rates of its parameters, the highest first; 0 where frozen.
    """

    name: str
    modules: tuple[str, ...]
    num_parameters: int
    rates: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class DepthMap:
    """A row per layer group, input to head."""

    plan: Plan
    rows: tuple[Row, ...]

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data: `learning_rates` holds the rate of each stage, 0 where frozen, or a list where a group has
        several."""
        return [
            {
                "name": row.name,
                "modules": list(row.modules),
                "parameters": row.num_parameters,
                "learning_rates": [rates[0] if len(rates) == 1 else list(rates) for rates in row.rates],
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        stages = self.plan.stages
        head = ("group", "modules", "parameters", *(f"{i} {s.name}" for i, s in enumerate(stages, 1)))
        table = [
            head,
            *((r.name, _shorten(r.modules), f"{r.num_parameters:,}", *map(_text, r.rates)) for r in self.rows),
        ]
        widths = [max(len(line[c]) for line in table) for c in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        if any(len(rates) > 1 for row in self.rows for rates in row.rates):
            lines.append(f"{SOME} the highest of several: some of its parameters are frozen, or have other rates")
        return "\n".join(["Learning rate of each group by stage, input to head (- is frozen):", *lines])

    def draw(self, path: str | Path) -> None:
        """Write a picture: groups from input to head, epochs to the right, the rate as colour, grey where frozen.

        Raises:
            UserError: the file's ending is of no kind of picture.
        """
        check_picture(path)
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.colors import LogNorm

        rates = [r[0] for row in self.rows for r in row.rates if r[0] > 0]
        low, high = min(rates), max(rates)
        norm = LogNorm(low if low < high else low / 2, high if low < high else high * 2)
        colours = plt.get_cmap("viridis")
        figure, axes = plt.subplots(figsize=(8, max(2.5, 0.28 * len(self.rows) + 1.2)), layout="constrained")
        begin = 0.0
        for i, stage in enumerate(self.plan.stages):
            for y, row in enumerate(self.rows):
                rate = row.rates[i][0]
                axes.barh(
                    y,
                    stage.epochs,
                    left=begin,
                    height=0.9,
                    color=colours(norm(rate)) if rate > 0 else "0.88",
                    hatch="//" if len(row.rates[i]) > 1 else None,
                    edgecolor="white",
                    linewidth=0.5,
                )
            axes.text(begin + stage.epochs / 2, len(self.rows) - 0.3, stage.name, ha="center", va="bottom", fontsize=8)
            begin += stage.epochs
        axes.set_yticks(range(len(self.rows)), [row.name for row in self.rows], fontsize=8)
        axes.set_ylim(-0.6, len(self.rows) + 0.4)
        axes.set_xlim(0, begin)
        axes.set_xlabel("epoch")
        axes.set_ylabel("layer group, input to head")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes, label="learning rate (grey: frozen)")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def check_picture(path: str | Path) -> None:
    """Raises:
    UserError: the file's ending is of no kind of picture, or its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"depth_map: {str(path)!r} is no kind of picture.", f"Let it end in {', '.join(PICTURES)}.")
    if not path.parent.is_dir():
        raise UserError(f"depth_map: there is no folder {str(path.parent)!r}.")


def depth_map(plan: Plan, groups: Sequence[LayerGroup]) -> DepthMap:
    """The map of a plan over the groups that it was made for."""
    return DepthMap(plan, tuple(_row(plan, group) for group in groups))


def _row(plan: Plan, group: LayerGroup) -> Row:
    free = [n for n, grad in zip(group.parameters, group.requires_grad, strict=True) if grad]
    rates = []
    for stage in plan.stages:
        found = {stage.rate(group.name, name) for name in free} | (
            {0.0} if len(free) < len(group.parameters) else set()
        )
        rates.append(tuple(sorted(found, reverse=True)))
    return Row(group.name, _modules(group), group.num_parameters, tuple(rates))


def _modules(group: LayerGroup) -> tuple[str, ...]:
    """The parts of a block, by their names in it; for the rest of a group, where it stands in the model."""
    found: dict[str, None] = {}
    for name in group.parameters:
        owner, _, own = name.rpartition(".")
        inside = f".{name}".partition(f".{group.name}.")[2]
        found[inside.split(".")[0] if inside else ".".join(owner.split(".")[-2:]) or own] = None
    return tuple(found)


def _shorten(modules: tuple[str, ...]) -> str:
    more = len(modules) - MOST_MODULES
    return ", ".join(modules[:MOST_MODULES]) + (f" and {more} more" if more > 0 else "")


def _text(rates: tuple[float, ...]) -> str:
    if not rates or math.isclose(rates[0], 0):
        return "-"
    return f"{rates[0]:.2g}{SOME if len(rates) > 1 else ''}"
