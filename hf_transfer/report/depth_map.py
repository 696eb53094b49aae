"""What a plan does to each layer group, as a table, as data and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer.errors import UserError
from hf_transfer.layers.groups import LayerGroup
from hf_transfer.plan.plan import Plan
from hf_transfer.training.schedules import Schedule

PICTURES = (".png", ".svg", ".pdf")
MOST_MODULES = 4
MOST_COLUMNS = 400
DARKEST = 1e-3  # lower end of the color scale, relative to the highest learning rate
SOME = "*"  # marks a learning rate that only some of a group's parameters have


@dataclass(frozen=True)
class Row:
    """One layer group under a plan.

    Attributes:
        name: name of the group.
        modules: names of its modules.
        num_parameters: number of elements.
        rates: for each stage, the distinct learning rates of its parameters, highest first; 0 where frozen.
    """

    name: str
    modules: tuple[str, ...]
    num_parameters: int
    rates: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class DepthMap:
    """Learning rates by layer group and stage.

    Attributes:
        plan: the plan; resolved to optimizer steps if the figure is to show the schedule.
        rows: the layer groups, input to head.
        schedule: the run's learning-rate schedule, from optimizer step to factor; None if it depends on a metric.
        num_steps: optimizer steps of the run; 0 if unknown.
    """

    plan: Plan
    rows: tuple[Row, ...]
    schedule: Schedule | None = None
    num_steps: int = 0

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data; `learning_rates` has one entry per stage: a learning rate, 0 if frozen, or a list of several."""
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
            lines.append(f"{SOME} highest of several: some parameters are frozen or have other learning rates")
        return "\n".join(["Learning rate of each group by stage, input to head (-: frozen):", *lines])

    def draw(self, path: str | Path) -> None:
        """Write a figure: layer groups from bottom to top, epochs from left to right, learning rates as color.

        Learning rates are shown for each optimizer step, including schedule and warmup; frozen groups are gray. If
        plateaus end stages, each stage is one column with its highest learning rates.

        Raises:
            UserError: unsupported file extension, or the folder does not exist.
        """
        check_picture(path)
        import matplotlib
        import numpy as np

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.colors import LogNorm

        edges, rates = self.rates()
        values = np.ma.masked_less(np.array(rates), 0)
        high = float(values.max()) or 1.0
        low = max(float(values[values > 0].min()), high * DARKEST) / 1.01
        norm = LogNorm(low, high * 1.01)
        colors = plt.get_cmap("viridis").with_extremes(bad="0.88")
        figure, axes = plt.subplots(figsize=(8, max(2.5, 0.28 * len(self.rows) + 1.2)), layout="constrained")
        drawn = axes.pcolormesh(edges, np.arange(len(self.rows) + 1) - 0.5, values.clip(low), norm=norm, cmap=colors)
        for y in range(1, len(self.rows)):
            axes.axhline(y - 0.5, color="white", linewidth=1)
        for begin, end, stage, index in self._spans():
            axes.axvline(begin, color="white", linewidth=1)
            axes.text((begin + end) / 2, len(self.rows) - 0.3, stage, ha="center", va="bottom", fontsize=8)
            for y, row in enumerate(self.rows):
                if len(row.rates[index]) > 1:
                    axes.fill_between([begin, end], y - 0.5, y + 0.5, color="none", hatch="//", edgecolor="white", lw=0)
        axes.set_yticks(range(len(self.rows)), [row.name for row in self.rows], fontsize=8)
        axes.set_ylim(-0.6, len(self.rows) + 0.4)
        axes.set_xlabel("stage (ended by plateaus)" if self.plan.waits else "epoch")
        if self.plan.waits:
            axes.set_xticks([])
        axes.set_ylabel("layer group, input to head")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.colorbar(drawn, ax=axes, label="learning rate (gray: frozen)")
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def _spans(self) -> list[tuple[float, float, str, int]]:
        """(start, end, name, index) of each stage, in epochs, or in stages if plateaus end them."""
        stages, total = self.plan.stages, self.plan.num_train_epochs
        if self.plan.waits:
            return [(float(i), float(i + 1), stage.name, i) for i, stage in enumerate(stages)]
        if self.num_steps:
            begins = [(stage.start or 0) / self.num_steps * total for stage in stages]
        else:
            begins = [sum(s.epochs or 0.0 for s in stages[:i]) for i in range(len(stages))]
        return [(b, e, s.name, i) for i, (b, e, s) in enumerate(zip(begins, [*begins[1:], total], stages, strict=True))]

    def rates(self) -> tuple[list[float], list[list[float]]]:
        """(edges of the columns, highest learning rate of each group in each column, -1 if frozen).

        A column is an optimizer step; a run with more than `MOST_COLUMNS` steps is sampled.
        """
        if self.plan.waits or not self.num_steps:
            spans = self._spans()
            rates = [[by_stage[0] if by_stage[0] > 0 else -1.0 for by_stage in row.rates] for row in self.rows]
            return [*(begin for begin, *_ in spans), spans[-1][1]], rates
        count = min(self.num_steps, MOST_COLUMNS)
        steps = [i * self.num_steps // count for i in range(count)]
        factor = self.schedule or (lambda step: 1.0)
        rates = []
        for row in self.rows:
            highest = [by_stage[0] for by_stage in row.rates]
            rates.append(
                [
                    self.plan.rate(step, highest) * factor(step) if highest[self.plan.at(step)] > 0 else -1.0
                    for step in steps
                ]
            )
        return [i / count * self.plan.num_train_epochs for i in range(count + 1)], rates


def check_picture(path: str | Path) -> None:
    """Check that a figure can be written to `path`.

    Raises:
        UserError: unsupported file extension, or the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURES:
        raise UserError(
            f"depth_map: unsupported file extension in {str(path)!r}.", f"Use one of {', '.join(PICTURES)}."
        )
    if not path.parent.is_dir():
        raise UserError(f"depth_map: folder {str(path.parent)!r} does not exist.")


def depth_map(
    plan: Plan, groups: Sequence[LayerGroup], schedule: Schedule | None = None, num_steps: int = 0
) -> DepthMap:
    """The depth map of a plan.

    Args:
        plan: the plan.
        groups: the layer groups that it was made for.
        schedule: the run's learning-rate schedule, if known.
        num_steps: optimizer steps of the run, if known.
    """
    return DepthMap(plan, tuple(_row(plan, group) for group in groups), schedule, num_steps)


def _row(plan: Plan, group: LayerGroup) -> Row:
    unfrozen = [n for n, grad in zip(group.parameters, group.requires_grad, strict=True) if grad]
    rates = []
    for stage in plan.stages:
        distinct = {stage.rate(group.name, name) for name in unfrozen}
        if len(unfrozen) < len(group.parameters):
            distinct.add(0.0)
        rates.append(tuple(sorted(distinct, reverse=True)))
    return Row(group.name, _modules(group), group.num_parameters, tuple(rates))


def _modules(group: LayerGroup) -> tuple[str, ...]:
    """Names of a group's modules: relative to the block, or the last parts of the path for modules outside it."""
    names: dict[str, None] = {}
    for name in group.parameters:
        owner, _, own = name.rpartition(".")
        inside = f".{name}".partition(f".{group.name}.")[2]
        names[inside.split(".")[0] if inside else ".".join(owner.split(".")[-2:]) or own] = None
    return tuple(names)


def _shorten(modules: tuple[str, ...]) -> str:
    more = len(modules) - MOST_MODULES
    return ", ".join(modules[:MOST_MODULES]) + (f" and {more} more" if more > 0 else "")


def _text(rates: tuple[float, ...]) -> str:
    if not rates or math.isclose(rates[0], 0):
        return "-"
    return f"{rates[0]:.2g}{SOME if len(rates) > 1 else ''}"
