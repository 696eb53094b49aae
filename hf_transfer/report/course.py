"""Sections on the training: curves, learning rates over time, the plan and what became of it, the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer.errors import UserError
from hf_transfer.evaluation.curves import LOSSES, METRICS, draw_curves
from hf_transfer.evaluation.metric_table import LEADING
from hf_transfer.report import plots
from hf_transfer.report.blocks import Block, Figures, Table, Text
from hf_transfer.report.figures import svg
from hf_transfer.report.plots import RateMap
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.words import NOTHING, count, number, rates, seconds, size
from hf_transfer.run_folder import held_out_by_each, refitted

_COLUMNS = 160  # of the map of learning rates


def stages_of(run: RunFiles) -> list[tuple[int, str]]:
    """(first step, name) of each stage that began; of a run that did not finish, from its log."""
    if "stages" in run.results:
        return [(int(stage["start"]), str(stage["name"])) for stage in run.results["stages"]]
    found, previous = dict[int, int](), 0
    for line in run.history:
        if "stage" in line:
            found.setdefault(int(line["stage"]), previous)
        previous = int(line["step"])
    return [(start, f"stage {index + 1}") for index, start in found.items()]


def frame(run: RunFiles) -> Any:
    """The log as `Predictor.history` gives it."""
    import pandas

    return pandas.json_normalize([dict(line) for line in run.history])


def curves(run: RunFiles) -> list[Block] | None:
    """Losses and validation metrics by step."""
    history, stages = frame(run), stages_of(run)
    try:
        drawings = [svg("losses", lambda: draw_curves(history, (LOSSES,), stages))]
    except UserError:  # nothing was logged: the head was solved for
        return None
    if any(f"eval_{name}" in history for name in (LEADING.get(run.problem_type) or ("accuracy",))[:1]):
        drawings.append(svg("metrics", lambda: draw_curves(history, (METRICS,), stages)))
    names = " → ".join(name for _, name in stages)
    about = [Text(f"Dotted lines: a stage begins ({names}).", "muted")] if len(stages) > 1 else []
    return [Figures(drawings), *about]


# ---- learning rates over time --------------------------------------------------------------------------------------


def rate_map_of(run: RunFiles) -> RateMap | None:
    """The learning rates that each layer group had, from the log; None if there is none by layer group."""
    logs = [line for line in run.history if isinstance(line.get("learning_rate"), Mapping)]
    if not logs:
        return None
    stages, steps = stages_of(run), int(logs[-1]["step"])
    logged = list(dict.fromkeys(name for line in logs for name in line["learning_rate"]))
    groups = [str(name) for name in run.results.get("layer_groups") or logged]
    columns = min(steps, _COLUMNS)
    table = [[0.0] * columns for _ in groups]
    for column in range(columns):
        step = (column + 0.5) * steps / columns
        now = _rates_at(step, logs, stages, run.results.get("plan") or ())
        for row, name in enumerate(groups):
            table[row][column] = now.get(name) or 0.0
    return RateMap(groups, table, steps, stages)


def _rates_at(
    step: float, logs: Sequence[Mapping[str, Any]], stages: Sequence[tuple[int, str]], plan: Sequence[Mapping[str, Any]]
) -> Mapping[str, float]:
    """Learning rates at a step: those of the nearest log of the same stage; without one, those of the plan."""
    index = max((i for i, (start, _) in enumerate(stages) if start <= step), default=0)
    own = [line for line in logs if line.get("stage", index) == index]
    if not own:
        return plan[index]["learning_rates"] if index < len(plan) else {}
    return min(own, key=lambda line: abs(line["step"] - step))["learning_rate"]


def layers(run: RunFiles) -> list[Block] | None:
    """The map of learning rates, and what was planned of each stage next to what it did."""
    found = rate_map_of(run)
    blocks: list[Block] = []
    if found is not None:
        blocks.append(Figures([svg("rates", lambda: plots.rate_map(found))]))
        blocks.append(Text("Learning rates as they were logged, input at the bottom, head at the top.", "muted"))
    return [*blocks, *_execution(run)] or None


def _execution(run: RunFiles) -> list[Block]:
    """The plan next to its execution."""
    plan, ran = run.results.get("plan") or [], run.results.get("stages") or []
    if not plan:
        return []
    leading = LEADING.get(run.problem_type, ("",))[0]
    rows = []
    for index, stage in enumerate(plan):
        done = ran[index] if index < len(ran) else None
        groups = [str(name) for name in stage["groups"]]
        trained = ", ".join(groups) if len(groups) < 4 else f"{groups[0]} … {groups[-1]} ({len(groups)})"
        logged = [
            rate
            for line in run.history
            if line.get("stage") == index and isinstance(line.get("learning_rate"), Mapping)
            for rate in line["learning_rate"].values()
        ]
        did = ("not begun", NOTHING, NOTHING, NOTHING, NOTHING)
        if done is not None:
            metric = (done.get("metrics") or {}).get(f"eval_{leading}")
            did = (count(done["steps"]), rates(logged), seconds(done["seconds"]), number(done["loss"]), number(metric))
        planned = "until a plateau" if stage["epochs"] is None else f"{stage['epochs']:g}"
        rows.append((stage["name"], trained, planned, rates(stage["learning_rates"].values()), *did))
    asked = ("stage", "trained groups", "planned epochs", "planned learning rate")
    head = (*asked, "steps", "logged learning rate", "time", "training loss", f"validation {leading}")
    return [Table(head, rows, words=2), *_stopped(run)]


def _stopped(run: RunFiles) -> list[Block]:
    """Which weights were kept, and what ended the run early."""
    kept, budget = run.results.get("kept") or {}, run.results.get("time_budget") or {}
    lines = []
    if stopped := kept.get("stopped"):
        lines.append(
            f"Stopped early after step {count(stopped['step'])} (early_stopping_patience: {stopped['patience']})."
        )
    if kept.get("weights") == "best":
        lines.append(f"Saved: the weights of the best evaluation, step {count(kept['step'])}.")
    elif kept.get("weights") == "solution":
        lines.append("Saved: the head that was solved for, on the backbone as it was.")
        if again := refitted(run.results):
            lines.append(
                f"It was solved for again on all {count(again['examples'])} examples (refit); the validation metrics "
                "are of the head before, on average a little worse."
            )
    elif (again := refitted(run.results)) is not None:
        lines.append(
            f"Saved: the mean of the weights of {again['trainings']} trainings (refit), of which this is the first; "
            f"the validation metrics are of this one. {held_out_by_each(again)}".rstrip()
        )
    elif kept.get("weights") == "last":
        lines.append(f"Saved: the last weights, step {count(kept['step'])}.")
    if budget.get("seconds") is not None:
        lines.append(
            f"Budget: {seconds(budget['seconds'])}; {count(budget['steps'])} steps of {count(budget['planned_steps'])} "
            "planned."
        )
    return [Text(" ".join(lines))] if lines else []


def cache(run: RunFiles) -> list[Block] | None:
    """What was computed once instead of in each epoch."""
    rows = []
    for stage in run.results.get("stages") or ():
        kept = stage.get("cache")
        if kept and kept["kept"] == "off":
            rows.append((stage["name"], f"off: {kept['why']}", "", "", ""))
        elif kept:
            where = f"output of {kept['at']}, {'in memory' if kept['kept'] == 'memory' else 'on disk'}"
            gain = kept.get("measured_gain")
            shown = (
                size(kept["bytes"]),
                seconds(kept["record_seconds"]),
                f"{number(gain, '.1f')}×" if gain else NOTHING,
            )
            rows.append((stage["name"], where, *shown))
    if not rows:
        return None
    if all(not row[2] for row in rows):
        return [Table(("stage", "frozen part"), [row[:2] for row in rows], words=2)]
    head = ("stage", "frozen part", "size", "recording", "steps faster by")
    return [Table(head, rows, words=2)]
