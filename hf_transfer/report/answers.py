"""Sections on how good the answers are: result, confusion matrix, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_transfer.evaluation import standing
from hf_transfer.evaluation.by_class import most_confused, pairs
from hf_transfer.evaluation.metric_table import LEADING, LOSS, METRIC_TABLE
from hf_transfer.report.blocks import Block, Cell, Table, Text, Tile, Tiles
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.words import NOTHING, count, interval, number, plural
from hf_transfer.run_folder import judged_by

MOST_CLASSES = 20  # of a confusion matrix; of more, those of the most frequent errors
_MOST_ROWS = 30  # of the table of classes; of more, those with the lowest recall, and a fold with all
_CONFUSIONS = 10
_VERDICTS = {
    standing.BETTER: ("Better than", ""),
    standing.UNCLEAR: ("Not significantly better than", "warning"),
    standing.WORSE: ("Worse than", "warning"),
}


def result(run: RunFiles) -> list[Block] | None:
    """Metrics with intervals and the baseline; of a run that did not finish, that it did not."""
    results = run.results
    if not results:
        last: Mapping[str, Any] = next((line for line in reversed(run.history) if "eval_loss" in line), {})
        steps = run.history[-1].get("step") if run.history else None
        shown = {k.removeprefix("eval_"): v for k, v in last.items() if k.removeprefix("eval_") in METRIC_TABLE}
        table = [Table(("last validation", ""), [(n, number(v)) for n, v in shown.items()])] if shown else []
        said = f"This run has not finished. The last line of its log is of step {count(steps)}."
        return [Text(said, "warning"), *table]
    values, intervals = results["metrics"], results.get("intervals") or {}
    baseline = results.get("baseline") or {}
    constant = baseline.get("metrics") or {}
    names = [n for n in LEADING.get(run.problem_type, ()) if n in values] or list(values)[:2]
    if len(names) < 2 and LOSS in values and LOSS not in names:
        names.append(LOSS)
    tiles = [Tile(name, number(values[name]), _note(name, intervals, constant)) for name in names]
    tiles.append(Tile("examples", count(run.num_examples), f"of the {run.split} split"))
    rows = [
        (name, number(value), interval(intervals.get(name)), number(constant[name]) if name in constant else "")
        for name, value in values.items()
    ]
    about = (
        "The intervals account for the sampling of these examples, not for the variation between seeds."
        if intervals
        else ""
    )
    return [
        Tiles(tiles),
        *_verdict(run, baseline),
        Table(("metric", "value", "95% CI", "baseline"), rows),
        *([Text(about, "muted")] if about else []),
        *_warnings(run),
    ]


def _note(name: str, intervals: Mapping[str, Any], constant: Mapping[str, Any]) -> str:
    parts = [f"95% CI {interval(intervals[name])}" if name in intervals else ""]
    parts.append(f"baseline {number(constant[name])}" if name in constant else "")
    return ", ".join(filter(None, parts))


def _verdict(run: RunFiles, baseline: Mapping[str, Any]) -> list[Block]:
    """Whether the model is better than a constant answer."""
    together = judged_by(run.results)
    words, tone = _VERDICTS.get(str((together or baseline).get("verdict")), ("", ""))
    if not words:
        return []
    answer = baseline.get("predicts")
    if run.problem_type == REGRESSION:
        what = f"the mean of the training set, {number(answer, '.4g')}"
    elif run.problem_type == MULTI_LABEL:
        what = ", ".join(map(str, answer or ())) or "no label"
    else:
        what = f"“{answer}”"
    by = baseline["compared_by"]
    if together:
        examples = count(together["examples"])
        by += f", {interval(together['interval'])} on {examples} examples, each held out by one training"
    return [Text(f"{words} the baseline, which always predicts {what} (by the 95% CI of {by}).", tone)]


def _warnings(run: RunFiles) -> list[Block]:
    """What to know before the numbers are believed."""
    found = []
    if run.results.get("metrics_split") == "validation":
        found.append(
            "There is no test split: these are the validation examples, and choices made on them are optimistic."
        )
    if run.results["metrics"].get(LOSS, 0) is None:
        found.append("The loss is NaN or infinite: training diverged. A lower learning_rate helps.")
    if drop := (run.results.get("kept") or {}).get("drop"):
        found.append(
            f"Training made the model worse: validation {drop['metric']} went from {number(drop['best'])} to "
            f"{number(drop['value'])}. load_best_model_at_end keeps the best weights."
        )
    if average := next((what for what in ("soup", "interpolation") if run.results.get(what)), ""):
        found.append(f"The weights are an average ({average}); what follows of training is of one of its runs.")
    return [Text(text, "warning" if "worse" in text or "diverged" in text else "muted") for text in found]


# ---- confusion -----------------------------------------------------------------------------------------------------


def cut(counts: Any, size: int) -> tuple[list[int], list[list[int]], list[int]]:
    """The part of a confusion matrix that is shown.

    Args:
        counts: of `metrics.confusion` for single-label classification.
        size: number of classes.

    Returns:
        (classes, in their order; counts of these; for each, how often it is taken for one that is not shown). All
        classes if there are at most `MOST_CLASSES`, else those of the most frequent errors.
    """
    classes = list(range(size))
    if size > MOST_CLASSES:
        chosen: dict[int, None] = {}
        for true, predicted, _ in most_confused(counts, size * size):
            if len({*chosen, true, predicted}) > MOST_CLASSES:
                break
            chosen |= {true: None, predicted: None}
        classes = sorted(chosen)
    place = {one: i for i, one in enumerate(classes)}
    table, others = [[0] * len(classes) for _ in classes], [0] * len(classes)
    for true, predicted, number_ in pairs(counts):
        if true in place and predicted in place:
            table[place[true]][place[predicted]] = number_
        elif true in place:
            others[place[true]] += number_
    return classes, table, others


def confusion(run: RunFiles) -> list[Block] | None:
    """The confusion matrix of single-label classification, and the most frequent errors."""
    counts, names = run.results.get("confusion"), run.labels
    if run.problem_type != SINGLE_LABEL or not counts:
        return None
    classes, table, others = cut(counts, len(names))
    is_cut = len(classes) < len(names)
    frequent = most_confused(counts, _CONFUSIONS)
    if not frequent:
        return [Text("All predictions are correct.")]
    rows = []
    for own, row, rest in zip(classes, table, others, strict=True):
        total = max(1, sum(row) + rest)
        cells = [
            Cell(count(n) if n else "", *((n / total, "good") if own == other else ((n / total) ** 0.5, "bad")))
            for other, n in zip(classes, row, strict=True)
        ]
        rows.append((names[own], *cells, *([count(rest) if rest else ""] if is_cut else [])))
    shown = [names[one] for one in classes] + (["others"] if is_cut else [])
    about = "Rows are true classes, columns are predictions; the color is the share of a row."
    if is_cut:
        about = f"Of {len(names):,} classes, those of the most frequent errors. {about}"
    errors = [(names[i], names[j], count(n)) for i, j, n in frequent]
    blocks: list[Block] = [Text(about, "muted"), Table(("true \\ predicted", *shown), rows, is_matrix=True)]
    if len(names) > 2:
        blocks.append(Table(("true", "predicted", "errors"), errors, words=2))
    return blocks


# ---- classes -------------------------------------------------------------------------------------------------------


def classes(run: RunFiles) -> list[Block] | None:
    """Recall, precision and F1 of each class."""
    entries = run.results.get("per_class")
    if not entries:
        return None
    counts = run.results.get("confusion") if run.problem_type == MULTI_LABEL else None
    more = ("false positives", "false negatives") if counts else ()
    head = ("label" if counts else "class", "examples", "recall", "precision", "F1", *more)
    rows = [(*_class(entry), *(map(count, counts[i][1:3]) if counts else ())) for i, entry in enumerate(entries)]
    if len(rows) <= _MOST_ROWS:
        return [Table(head, rows)]
    order = sorted(range(len(rows)), key=lambda i: (_recall(entries[i]), -entries[i]["support"]))
    worst = [rows[i] for i in order[:_MOST_ROWS]]
    return [
        Text(f"The {_MOST_ROWS} of {plural(len(rows), 'class')} with the lowest recall.", "muted"),
        Table(head, worst),
        Table(head, rows, folded=f"All {plural(len(rows), 'class')}"),
    ]


def _recall(entry: Mapping[str, Any]) -> float:
    return 2.0 if entry["recall"] is None else float(entry["recall"])


def _class(entry: Mapping[str, Any]) -> Sequence[Any]:
    precision, recall = entry["precision"], entry["recall"]
    f1 = None
    if precision is not None or recall is not None:
        p, r = precision or 0.0, recall or 0.0
        f1 = 2 * p * r / (p + r) if p + r else 0.0
    shown = [Cell(number(v), v) if v is not None else NOTHING for v in (recall, precision, f1)]
    return (entry["label"], count(entry["support"]), *shown)
