"""What a finished run says of its result, from `results.json` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.evaluation import standing
from hf_transfer.evaluation.measure import format_metrics
from hf_transfer.objectives.adaptation import outcome
from hf_transfer.objectives.adaptation.distance_in_words import both_in_words
from hf_transfer.run_folder import held_out_by_each, judged_by, refitted
from hf_transfer.training.pace import exactly

_ALL_CLASSES = 10  # up to so many, the recall of every class is printed
_WORST_CLASSES = 5  # of more, that of the worst
_CONFUSIONS = 3
_MOST_NAMES = 5


def ending(results: Mapping[str, Any]) -> Iterator[str]:
    """The result next to the baseline, the classes, the confusions, and what was kept."""
    baseline = results["baseline"]
    yield from format_metrics(results["metrics"], results["intervals"], baseline["metrics"])
    yield from filter(None, [_verdict(results)])
    yield from _classes(results)
    if confusions := results["confusions"]:
        shown = [f"{c['true']} taken for {c['predicted']} ({c['count']:,})" for c in confusions[:_CONFUSIONS]]
        yield f"Most frequent errors: {', '.join(shown)}"
    yield from _budget(results)
    yield from _forgotten(results.get("forgetting"))
    yield from outcome.lines(results)
    yield from filter(None, [both_in_words((results.get("domain_adaptation") or {}).get("distance"))])
    yield from _kept(results["kept"])
    yield from _refit(results)
    if ema := results.get("ema"):  # a run of an earlier version has no such entry
        yield f"These weights, and all that were evaluated, are averages over the steps (ema_decay: {ema['decay']:g})"


def _verdict(results: Mapping[str, Any]) -> str:
    """Whether the model is better than the baseline; empty where that cannot be said."""
    baseline, kind = results["baseline"], results["problem_type"]
    name, together = baseline["compared_by"], judged_by(results)
    found = together or {
        "value": results["metrics"].get(name),
        "interval": results["intervals"].get(name),
        "baseline": baseline["metrics"].get(name),
        "verdict": baseline["verdict"],
    }
    if found["verdict"] is None:
        return ""
    answer = baseline["predicts"]
    if kind == REGRESSION:
        what = f"always predicting the mean of the training set, {answer:.4g}"
    elif kind == MULTI_LABEL:
        labels = ", ".join(answer[:_MOST_NAMES]) + (", …" if len(answer) > _MOST_NAMES else "")
        what = f"always predicting {labels or 'no label'}"
    else:
        what = f"always predicting {answer!r}"
    value, (low, high) = found["value"], found["interval"]
    words = {
        standing.BETTER: "Better than",
        standing.UNCLEAR: "Not significantly better than",
        standing.WORSE: "Worse than",
    }
    shown = f"{value:.4f} (95% CI {low:.4f} to {high:.4f})" if _is_number(value) else "NaN"
    where = f" on {together['examples']:,} examples, each held out by one training" if together else ""
    constant = f"baseline {found['baseline']:.4f}"
    return f"{words[found['verdict']]} the baseline, which is {what}: {name} {shown}{where}, {constant}"


def _is_number(value: Any) -> bool:
    return value is not None and value == value


def _classes(results: Mapping[str, Any]) -> Iterator[str]:
    """The recall of each class, or of the worst if there are many."""
    classes = [c for c in results["per_class"] if c["support"]]
    if not classes:
        return
    is_cut = len(classes) > _ALL_CLASSES
    if is_cut:
        classes = sorted(classes, key=lambda c: (c["recall"], -c["support"]))[:_WORST_CLASSES]
    cut = f", the lowest of {len(results['per_class']):,}" if is_cut else ""
    yield f"Recall by {_unit(results)}{cut}:"
    width = max(len(c["label"]) for c in classes)
    for c in classes:
        precision = "never predicted" if c["precision"] is None else f"precision {c['precision']:.4f}"
        right = round(c["recall"] * c["support"])
        yield f"  {c['label']:<{width}}  {c['recall']:.4f} ({right:,} of {c['support']:,})   {precision}"


def _unit(results: Mapping[str, Any]) -> str:
    return "label" if results["problem_type"] == MULTI_LABEL else "class"


def _kept(kept: Mapping[str, Any] | None) -> Iterator[str]:
    """Which weights the folder holds, and a warning if better ones were thrown away."""
    if kept is None:
        return
    if kept["weights"] == "solution":
        yield "Saved: the head that was solved for, on the backbone as it was"
        return
    value, best, metric = kept["value"], kept["best_value"], kept["metric"]
    if stopped := kept.get("stopped"):  # a run of an earlier version has no such entry
        when, patience = _when(stopped["epoch"], stopped["step"]), f"early_stopping_patience: {stopped['patience']}"
        yield f"Stopped early {when}: validation {metric} no longer improved ({patience})"
    of = f", validation {metric} {value:.4f}" if _is_number(value) else ""
    if kept["weights"] == "best":
        yield f"Saved: the weights of the best evaluation, {_when(kept['epoch'], kept['step'])}{of}"
        return
    line = f"Saved: the last weights, {_when(kept['epoch'], kept['step'])}{of}"
    if not _is_number(best):
        yield line
    elif kept["best_step"] == kept["step"]:
        yield f"{line} (the best)"
    else:
        yield f"{line}; the best was {best:.4f} {_when(kept['best_epoch'], kept['best_step'])}"
    if drop := kept["drop"]:
        flags = "--load_best_model_at_end" + ("" if kept["is_chosen"] else f" --metric_for_best_model {drop['metric']}")
        moved = "rose" if drop["value"] > drop["best"] else "fell"
        yield (
            f"Warning: training made the model worse: validation {drop['metric']} {moved} from {drop['best']:.4f} at "
            f"epoch {drop['best_epoch']:.2f} to {drop['value']:.4f}, by more than chance explains on "
            f"{drop['examples']:,} examples. Save the best weights with {flags}, or lower learning_rate."
        )


def _refit(results: Mapping[str, Any]) -> Iterator[str]:
    """What the saved head was solved for on, where that is more than what was measured; see `runs.refitting`."""
    if not (again := refitted(results)):
        return
    first = again["examples"] - again["held_out"]
    if trainings := again.get("trainings"):
        which = "validation_metrics" if results["metrics_split"] == "test" else "all metrics above"
        yield (
            f"Their mean with the weights of {trainings - 1} more trainings, which held out others of the "
            f"{again['examples']:,} examples, was saved (refit, {again['seconds']:.0f} s); {which} are of the first, "
            "on average a little worse"
        )
        if judged_by(results) is None and (each := held_out_by_each(again)):  # else the verdict has said it
            yield each.rstrip(".")
        return
    which = "validation_metrics" if results["metrics_split"] == "test" else "all metrics above"
    yield (
        f"It was solved for again on all {again['examples']:,} examples (refit); {which} are of the head of the "
        f"{first:,} training examples, on average a little worse"
    )


def _budget(results: Mapping[str, Any]) -> Iterator[str]:
    """What became of a budget of time; nothing without one, and in a run of an earlier version."""
    budget = results.get("time_budget")
    if not budget:
        return
    given = ", ".join(f"{name} {budget[name]:g}" for name in ("max_hours", "max_usd") if budget[name] is not None)
    if budget["seconds"] is None:
        yield f"{given}: no effect, the head was solved for without training steps"
        return
    took, allowed = exactly(results["train_seconds"]), exactly(budget["seconds"])
    steps, planned = budget["steps"], budget["planned_steps"]
    why = f"{steps:,} of {planned:,} steps planned"
    if (results["kept"] or {}).get("stopped"):
        why += ", stopped early"
    elif steps >= planned:
        why = f"all {planned:,} steps planned; a higher num_train_epochs would use the rest"
    yield f"{given}: ended after {took} of {allowed}, {why} (preparation: {exactly(budget['preparation_seconds'])})"


def _forgotten(old: Mapping[str, Any] | None) -> Iterator[str]:
    """What became of the checkpoint's own task; nothing without one, and in a run of an earlier version."""
    if old:
        where = f"{old['metric']} on {old['split']} of {old['dataset']}, {old['num_examples']:,} examples"
        before = "" if old["before"] is None else f"{old['before']:.4f} before training, "
        yield f"Old task, with the checkpoint's head ({where}): {before}{old['after']:.4f} after"


def _when(epoch: float, step: int) -> str:
    return f"after epoch {epoch:.0f}" if abs(epoch - round(epoch)) < 0.005 and epoch >= 1 else f"after step {step:,}"
