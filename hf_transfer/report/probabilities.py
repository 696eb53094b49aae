"""Sections on what the probabilities are worth: calibration, abstaining, thresholds; and the values of a regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_transfer.data.labels import MULTI_LABEL, SINGLE_LABEL
from hf_transfer.evaluation import logit_adjustment
from hf_transfer.evaluation.calibration import describe
from hf_transfer.report import plots
from hf_transfer.report.blocks import Block, Figures, Table, Text
from hf_transfer.report.figures import svg
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.words import number, percent

_COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.5)
_MOST_LINES = 6  # labels with a curve of their own in the figure


def _curves(run: RunFiles, name: str) -> Any:
    return (run.results.get("diagnostics") or {}).get(name)


def calibration(run: RunFiles) -> list[Block] | None:
    """Reliability before and after the temperature."""
    after, before = _curves(run, "reliability"), _curves(run, "reliability_before")
    done, adjusted = run.results.get("calibration"), run.results.get("logit_adjustment")
    if not after:
        return [Text(f"Calibrated: {describe(done)}.")] if done else None
    is_multi = run.problem_type == MULTI_LABEL
    curves = {"as saved": after} if before is None else {"before": before, "as saved": after}
    along = "probability of a label" if is_multi else "confidence of the answer"
    metric = "frequency of the label" if is_multi else "accuracy"
    blocks: list[Block] = [Figures([svg("reliability", lambda: plots.reliability(curves, along, metric))])]
    rows = [(name, number(_gap(bins))) for name, bins in curves.items()]
    blocks.append(Table(("model", f"ECE on {run.split}"), rows))
    if done:
        blocks.append(Text(f"Calibration: {describe(done)}. The saved weights include it."))
    else:
        why = (run.results.get("calibrate") or {}).get("why")
        blocks.append(Text("Not calibrated" + (f": {why}." if why else "."), "muted"))
    if adjusted and adjusted["strength"]:
        blocks.append(Text(f"Logit adjustment: {logit_adjustment.describe(adjusted)}. The saved weights include it."))
    about = "Dots are bins of answers, as large as they are full; on the dotted line, a probability is a frequency."
    return [*blocks, Text(about, "muted")]


def _gap(bins: Mapping[str, Any]) -> float:
    """Expected calibration error, from the bins."""
    whole = sum(bins["count"])
    parts = zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True)
    return sum(n * abs(p - a) for n, p, a in parts if n) / max(1, whole)


def abstaining(run: RunFiles) -> list[Block] | None:
    """Accuracy if only the most confident answers are given."""
    found = _curves(run, "coverage")
    if run.problem_type != SINGLE_LABEL or not found:
        return None
    places = list(zip(found["coverage"], found["accuracy"], found["confidence"], strict=True))
    rows = []
    for wanted in _COVERAGES:
        covered, accuracy, confidence = min(places, key=lambda place: abs(place[0] - wanted))
        rows.append((percent(covered), number(accuracy), number(confidence)))
    series = {"accuracy": found["accuracy"]}
    drawing = svg("coverage", lambda: plots.lines(found["coverage"], series, "fraction of answers given", "accuracy"))
    return [
        Figures([drawing]),
        Table(("answers given", "accuracy", "lowest confidence"), list(dict.fromkeys(rows)), words=0),
        Text(
            f"The least confident answers are withheld, on {run.split}. predict --abstain does so by conformal sets.",
            "muted",
        ),
    ]


def thresholds(run: RunFiles) -> list[Block] | None:
    """Metrics of several labels by threshold."""
    found = _curves(run, "thresholds")
    if not found:
        return None
    x, tuned = found["threshold"], run.keys.get("tune_thresholds")
    over_all = {"precision": found["precision"], "recall": found["recall"], "F1 (micro)": found["f1_micro"]}
    own = found["labels"]
    shown = {one["label"]: one["f1"] for one in own[:_MOST_LINES]}
    mark = None if tuned else 0.5
    drawings = [svg("thresholds", lambda: plots.lines(x, over_all, "threshold", "over all labels", mark))]
    if len(shown) > 1:
        drawings.append(svg("labels", lambda: plots.lines(x, shown, "threshold", "F1", mark)))
    rows = [
        (one["label"], number(one["f1"][x.index(0.5)]), number(max(one["f1"])), number(x[_best(one["f1"])], ".2f"))
        for one in own
    ]
    about = (
        "The saved thresholds were tuned on the validation split, one per label."
        if tuned
        else "Labels with a probability above 0.5 are predicted; tune_thresholds: true chooses a threshold per label "
        "on the validation split. The best ones here are those of the examples that are measured, and optimistic."
    )
    return [Figures(drawings), Table(("label", "F1 at 0.5", "best F1", "at"), rows), Text(about, "muted")]


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def values(run: RunFiles) -> list[Block] | None:
    """Predicted against true values of a regression."""
    points = _curves(run, "points")
    if not points:
        return None
    about = "Each dot is an example; on the dotted line, the prediction is right."
    return [Figures([svg("values", lambda: plots.values(points))]), Text(about, "muted")]
