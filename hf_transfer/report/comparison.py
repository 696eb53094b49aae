"""`report.html` of a comparison of several runs, from its `compare.json`: one file that loads nothing from anywhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_transfer.config.values import load_yaml
from hf_transfer.errors import UserError
from hf_transfer.files import write_text
from hf_transfer.report import cost_plot, row_curves, search_plot
from hf_transfer.report.blocks import Block, Code, Figures, Table, Text, Tile, Tiles
from hf_transfer.report.cost_plot import Point
from hf_transfer.report.figures import HEIGHT, WIDTH, svg
from hf_transfer.report.page import render, short
from hf_transfer.report.search_plot import Dot
from hf_transfer.report.sections import Filled
from hf_transfer.report.words import NOTHING, interval, number, percent, plural, seconds
from hf_transfer.run_folder import COMPARISON, REPORT

_RECIPE = "compare.yaml"
_MOST_CURVES = 10  # colors and kinds of lines that can be told apart
_HURT = "hurt"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ComparisonFiles:
    """What a comparison left.

    Attributes:
        folder: of the comparison.
        whole: of `compare.json`.
        keys: of `compare.yaml`.
    """

    folder: Path
    whole: Mapping[str, Any]
    keys: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> ComparisonFiles:
        """The files of a folder.

        Raises:
            UserError: one of them is damaged.
        """
        folder = Path(folder).expanduser()
        recipe = folder / _RECIPE
        try:
            whole = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
            keys = load_yaml(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"the files in {str(folder)!r} cannot be read: {error}.", key="RUN") from error
        return cls(folder, whole, keys or {})

    @property
    def rows(self) -> list[Row]:
        return list(self.whole["rows"])

    @property
    def metric(self) -> str:
        return str(self.whole["metric"])

    @property
    def chosen(self) -> Row | None:
        """The row that is best on validation."""
        return next((row for row in self.rows if row["is_chosen"]), None)


def is_comparison(folder: str | Path) -> bool:
    """Whether it is the folder of a comparison that has ended."""
    return (Path(folder).expanduser() / COMPARISON).is_file()


def write(folder: str | Path) -> Path:
    """Write the page of the comparison in `folder`. The same files give the same page, byte for byte.

    Raises:
        UserError: its files are damaged.
    """
    found = ComparisonFiles.read(folder)
    path = found.folder / REPORT
    write_text(path, render(_title(found), sections(found)))
    return path


def _title(found: ComparisonFiles) -> str:
    model, data = (found.keys.get(name) for name in ("model_name_or_path", "dataset_name"))
    data = data or found.keys.get("train_file")
    return f"Comparison: {short(model) if model else 'several models'} on {short(data) if data else 'several datasets'}"


def sections(found: ComparisonFiles) -> list[Filled]:
    """The parts of the page, without those that the comparison has nothing for."""
    parts = (
        ("result", "Result", _result(found)),
        ("rows", "Rows", _table(found)),
        ("cost", "What they reach and what it costs", _cost(found)),
        ("curves", "Epoch by epoch", _curves(found)),
        ("trials", "Trials", _trials(found)),
        ("transfer", "Did pretraining help?", _verdicts(found)),
        ("failures", "What has no result", _failures(found)),
        ("loading", "How to use the best", _loading(found)),
    )
    return [Filled(name, title, blocks) for name, title, blocks in parts if blocks]


# ---- the sections ----------------------------------------------------------------------------------------------------


def _result(found: ComparisonFiles) -> list[Block]:
    whole, chosen, tests = found.whole, found.chosen, found.whole.get("test")
    size = plural(len(found.rows), "row"), plural(len(whole["seeds"]), "seed")
    tiles = [Tile("compared", size[0], f"{size[1]} each")]
    if chosen is not None:
        tiles.insert(0, Tile(f"{found.metric} on validation", number(chosen["mean"]), _ci(chosen["interval"])))
    if tests:
        tiles.insert(1, Tile(f"{tests['metric']} on test", number(tests["mean"]), _ci(tests["interval"])))
    said = "No run has ended." if chosen is None else f"Best on validation: {chosen['row']}."
    blocks: list[Block] = [Tiles(tiles), Text(said, "warning" if chosen is None else "")]
    combined = whole.get("combined") or {}
    if "value" in combined:
        blocks.append(
            Text(
                f"{combined['way'].capitalize()} of {combined['runs']} runs: {combined['metric']} "
                f"{number(combined['value'])} on validation; the best single run has {number(combined['best_single'])}."
            )
        )
    return [*blocks, *(Text(str(note), "muted") for note in whole.get("notes") or ())]


def _ci(bounds: Any) -> str:
    return f"95% CI over seeds {interval(bounds)}" if bounds else ""


def _table(found: ComparisonFiles) -> list[Block]:
    head = ["row", found.metric, "95% CI", "minus first", "95% CI", "p", "p (Holm)"]
    head += ["gap", "training", "trained", "cost"]
    rows = [_cells(index, row) for index, row in enumerate(found.rows, 1)]
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    table = Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])
    seeds = [str(seed) for seed in found.whole["seeds"]]
    if len(seeds) < 2:
        return [table]
    of_seeds = [(row["row"], *(number(row["values"].get(seed)) for seed in seeds)) for row in found.rows]
    return [table, Table(["row", *(f"seed {seed}" for seed in seeds)], of_seeds, folded=f"{found.metric} by seed")]


def _cells(index: int, row: Row) -> list[str]:
    difference = row.get("difference") or {}
    mark = " *" if row["is_chosen"] else ""
    has_none = "stopped" if row.get("stopped") else "failed"
    return [
        f"{index}{mark}  {row['row']}",
        has_none if row["mean"] is None else number(row["mean"]),
        interval(row["interval"]),
        _optional(difference.get("mean"), "+.4f"),
        _signed(difference.get("interval")),
        _optional(difference.get("p"), ".3g"),
        _optional(row.get("p_holm"), ".3g"),
        _optional(row.get("gap"), "+.3f"),
        "" if row["train_seconds"] is None else seconds(row["train_seconds"]),
        "" if row["trainable_share"] is None else percent(row["trainable_share"]),
        "" if row["usd"] is None else f"${row['usd']:.3g}",
    ]


def _optional(value: Any, form: str) -> str:
    return "" if value is None else number(value, form)


def _signed(bounds: Any) -> str:
    return f"{number(bounds[0], '+.4f')} to {number(bounds[1], '+.4f')}" if bounds else ""


def _cost(found: ComparisonFiles) -> list[Block] | None:
    shown = [row for row in found.rows if row["mean"] is not None]
    is_paid = all(row["usd"] is not None for row in shown)
    cost = "usd" if is_paid else "train_seconds"
    names = {id(row): str(index) for index, row in enumerate(found.rows, 1)}
    shown = [row for row in shown if row[cost] is not None]
    if not shown:
        return None
    points = [
        Point(names[id(row)], row[cost], row["mean"], tuple(row["interval"]) if row["interval"] else None)
        for row in shown
    ]
    mark = next((names[id(row)] for row in shown if row["is_chosen"]), "")
    along = "dollars per run" if is_paid else "seconds of training"
    numbers = [point.name for point in points]
    drawing = svg("cost", lambda: cost_plot.figure(points, numbers, along, found.metric, mark, (WIDTH, HEIGHT)))
    about = "Numbers are those of the table; the star is the best on validation, and bars are 95% intervals."
    return [Figures([drawing]), Text(about, "muted")]


def _curves(found: ComparisonFiles) -> list[Block] | None:
    curves = {
        str(index): {int(epoch): value for epoch, value in row["by_epoch"].items()}
        for index, row in enumerate(found.rows, 1)
        if len(row["by_epoch"]) > 1
    }
    if not curves:
        return None
    best = sorted(curves, key=lambda name: name != _number_of(found.chosen, found.rows))[:_MOST_CURVES]
    few = {name: curve for name, curve in curves.items() if name in best}
    mark = _number_of(found.chosen, found.rows)

    def draw() -> Any:
        figure = row_curves.figure(few, found.metric, mark, (WIDTH, HEIGHT))
        figure.legend(loc="outside right center", frameon=False)
        return figure

    left_out = f" The first {len(few)} of {len(curves)} are drawn." if len(few) < len(curves) else ""
    about = f"Means over the seeds, by the number of the row; the thick line is the best on validation.{left_out}"
    return [Figures([svg("curves", draw)]), Text(about, "muted")]


def _number_of(chosen: Row | None, rows: Sequence[Row]) -> str:
    return "" if chosen is None else str(rows.index(chosen) + 1)


def _trials(found: ComparisonFiles) -> list[Block] | None:
    """What the trials of a search reach, by key."""
    if not found.whole.get("is_search"):
        return None
    dots = [(row, value) for row in found.rows if row["settings"] and (value := _reached(row)) is not None]
    if not dots:
        return None
    drawn = [Dot(row["settings"], value, bool(row["stopped"]), row["is_chosen"]) for row, value in dots]
    keys = list(drawn[0].settings)
    drawings = [svg(f"trials{i}", partial(_panel, drawn, key, found.metric)) for i, key in enumerate(keys)]
    stopped = [(row["row"], row["stopped"]) for row, _ in dots if row["stopped"]]
    said = "A dot is a trial; the star is the best on validation, hollow ones were stopped early."
    blocks: list[Block] = [Text(f"Searched: {', '.join(keys)}. {said}", "muted"), Figures(drawings)]
    if stopped:
        blocks.append(Table(("trial", "stopped"), stopped, words=2, folded=f"{plural(len(stopped), 'trial')} stopped"))
    return blocks


def _panel(dots: Sequence[Dot], key: str, metric: str) -> Any:
    """The figure of one key."""
    return search_plot.figure([replace(dot, settings={key: dot.settings[key]}) for dot in dots], metric)


def _reached(row: Row) -> float | None:
    """The mean of a trial, or what it had reached when it was stopped."""
    if row["mean"] is not None:
        return float(row["mean"])
    curve = {int(epoch): value for epoch, value in row["by_epoch"].items()}
    return float(curve[max(curve)]) if curve else None


def _verdicts(found: ComparisonFiles) -> list[Block] | None:
    verdicts = [(row, one) for row in found.rows for one in row.get("transfer") or ()]
    if not verdicts:
        return None
    cells = [_verdict(row, one) for row, one in verdicts]
    head = ("row", "against", "verdict", found.metric, "reference", "difference", "95% CI")
    hurt = sum(one["verdict"] == _HURT for _, one in verdicts)
    warning = [Text(f"Pretraining or tuning hurt in {plural(hurt, 'comparison')}.", "warning")] if hurt else []
    reasons = [
        Text(f"{row['row']} against {one['against']}: {one['why_not']}.", "muted")
        for row, one in verdicts
        if one["why_not"]
    ]
    about = (
        "scratch: the same model from random weights; linear-probe: from frozen features. Helped or hurt: the 95% "
        "interval of the difference, paired by seed, lies on one side of zero."
    )
    return [*warning, Table(head, cells, words=3), *reasons, Text(about, "muted")]


def _verdict(row: Row, one: Row) -> tuple[str, ...]:
    difference = one.get("difference") or {}
    return (
        row["row"],
        one["against"],
        one["verdict"],
        number(row["mean"]),
        number(one.get("reference")),
        number(difference.get("mean"), "+.4f"),
        _signed(difference.get("interval")) or NOTHING,
    )


def _failures(found: ComparisonFiles) -> list[Block] | None:
    failures = [(f"{row['row']}, seed {seed}", why) for row in found.rows for seed, why in row["failures"].items()]
    failures += [(one["name"], one["why_not"]) for one in found.whole.get("references") or () if one["why_not"]]
    combined = found.whole.get("combined") or {}
    if combined.get("why_not"):
        failures.append(("soup or ensemble", combined["why_not"]))
    blocks: list[Block] = []
    if failures:
        again = "The same command tries them again, and keeps what has ended."
        blocks = [Table(("run", "reason"), failures, words=2), Text(again, "muted")]
    left_out = [(line,) for line in found.whole.get("left_out") or ()]
    return [*blocks, *([Table(("left out",), left_out)] if left_out else [])] or None


def _loading(found: ComparisonFiles) -> list[Block] | None:
    chosen = found.chosen
    if chosen is None:
        return None
    places = [(seed, number(value), f"cells/{chosen['cells'][seed]}") for seed, value in chosen["values"].items()]
    folder = f"{found.keys.get('output_dir') or found.folder.name}/{places[0][2]}"
    place = shlex.quote(folder)
    commands = [f"hf-transfer predict {place} -", f"hf-transfer evaluate {place}", f"hf-transfer report {place}"]
    ours = ["from hf_transfer import Predictor", "", f"predictor = Predictor.load({json.dumps(folder)})"]
    return [
        Text(f"The runs of {chosen['row']}, of which the commands take the first seed's:"),
        Table(("seed", found.metric, "folder"), places, words=3),
        Code("\n".join(commands)),
        Code("\n".join(ours)),
    ]
