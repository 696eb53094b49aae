"""What `effort` sets besides the choice of `strategy: auto`: the table of keys, and where it does not apply."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hf_transfer.analysis.few_labels import Choice
from hf_transfer.evaluation.metric_table import LEADING, LOSS, greater_is_better

NORMAL = "normal"


@dataclass(frozen=True)
class Times:
    """A multiple of the value that a key has otherwise."""

    factor: float


LEADS = "leads"  # of the metric that runs of this kind are judged by: while a model learns, its loss may rise for long
EFFORTS: dict[str, dict[str, Any]] = {
    "quick": {"strategy": "linear-probe", "probe_solver": "lbfgs", "label_issues": False},
    NORMAL: {},
    "best": {
        "num_train_epochs": Times(2),
        "load_best_model_at_end": True,
        "metric_for_best_model": LEADS,
        "greater_is_better": LEADS,
        "save_strategy": "epoch",
    },
}
_REPEATED = {"refit": True}  # up to `few_labels.AVERAGED` examples
_SOLUTION = ("strategy", "probe_solver")
_METRIC = ("metric_for_best_model", "greater_is_better")
_BEST_WEIGHTS = ("load_best_model_at_end", *_METRIC, "save_strategy")


def choose(
    effort: str,
    values: Mapping[str, Any],
    given: Collection[str],
    chosen: Mapping[str, Choice],
    unsolvable: str,
    averages: bool = False,
) -> dict[str, Choice]:
    """Values for a run with an effort; keys that were given may be among them.

    Args:
        effort: a name in `EFFORTS`.
        values: every key with its value.
        given: the keys that were given; a strategy of `auto` is none.
        chosen: what `strategy: auto` chooses.
        unsolvable: for `quick`, why the head cannot be solved for alone, as part of a sentence; empty if it can.
        averages: for `best`, whether several trainings are averaged, in place of a longer one with the best weights:
            few validation examples do not tell which are the best.
    """
    if effort == NORMAL:
        return dict(chosen)
    before = {**values, **{name: choice.value for name, choice in chosen.items() if name not in given}}
    refused = _no_solution(values, given, unsolvable) if effort == "quick" else _no_longer(before, given)
    refused = {} if averages else refused
    told = {
        name: Choice(_value(wanted, name, before), _why(wanted, before[name], effort))
        for name, wanted in (_REPEATED if averages else EFFORTS[effort]).items()
        if name not in refused
    }
    reasons = "; ".join(dict.fromkeys(refused[name] for name in refused if refused[name]))
    solves = effort == "quick" and not refused
    # Few examples choose the course of training everything, which a solution has none of.
    return {
        **({} if solves else chosen),
        **told,
        # `run.yaml` holds the values themselves, so that a repeated run adds nothing to them.
        "effort": Choice(NORMAL, f"effort: {effort} does not wholly apply: {reasons}" if reasons else ""),
    }


def averaged(chosen: Mapping[str, Choice], is_best: bool) -> dict[str, Choice]:
    """What `best` makes of the choice of a layer where only the head is fitted: the average of one head on each.

    On 8 to 32 sentences per class it was 1.6 points more accurate in the mean; see `docs/few-labels.md`. The other
    efforts keep the one layer, which plain transformers can load, and say so.

    Args:
        chosen: `pooling` and `pooling_layer` among it.
        is_best: whether this is `best`.
    """
    layer = chosen["pooling_layer"]
    if chosen["pooling"].value != "mean":
        return {}
    if is_best:
        why = "effort: best, the heads of all layers of the upper half together; plain transformers cannot load it"
        return {"pooling_layer": Choice("average", why)}
    more = "effort: best averages several, often better by a point, but only hf_transfer loads that"
    return {"pooling_layer": Choice(layer.value, f"{layer.why}; {more}")}


def _value(wanted: Any, name: str, before: Mapping[str, Any]) -> Any:
    if isinstance(wanted, Times):
        return before[name] * wanted.factor
    if wanted != LEADS:
        return wanted
    metric = LEADING[before["problem_type"]][0] if before["problem_type"] else LOSS
    return metric if name == "metric_for_best_model" else bool(greater_is_better(metric))


def _why(wanted: Any, before: Any, effort: str) -> str:
    return f"effort: {effort}, {wanted.factor:g} times {before:g}" if isinstance(wanted, Times) else f"effort: {effort}"


def _no_solution(values: Mapping[str, Any], given: Collection[str], unsolvable: str) -> dict[str, str]:
    """{key of `quick` that is not set: why}"""
    for name, fits in (("stages", None), ("strategy", "linear-probe"), ("probe_solver", "lbfgs")):
        if name in given and values[name] != fits:  # a strategy of null is one
            said = "stages were given" if name == "stages" else f"{name}: {values[name]} was given"
            return dict.fromkeys(_SOLUTION, said)
    return dict.fromkeys(_SOLUTION, f"the head cannot be solved for: {unsolvable}") if unsolvable else {}


def _no_longer(before: Mapping[str, Any], given: Collection[str]) -> dict[str, str]:
    """{key of `best` that is not set: why}; without a reason where nothing is missing."""
    if before["probe_solver"] == "lbfgs":
        return dict.fromkeys(EFFORTS["best"], "the head is solved for, which takes no steps")
    refused = {}
    if before["stages"] is not None:
        refused["num_train_epochs"] = "stages say how long they are"
    elif before["max_steps"] > 0:
        refused["num_train_epochs"] = f"max_steps: {before['max_steps']} was given"
    evaluates = getattr(before["eval_strategy"], "value", before["eval_strategy"])
    saves = getattr(before["save_strategy"], "value", before["save_strategy"])
    if before["load_best_model_at_end"] or "load_best_model_at_end" in given:
        refused |= dict.fromkeys(_BEST_WEIGHTS[1:], "")
    elif evaluates != "epoch":
        refused |= dict.fromkeys(_BEST_WEIGHTS, f"eval_strategy: {evaluates} was given")
    elif "save_strategy" in given and saves not in ("epoch", "best"):
        refused |= dict.fromkeys(_BEST_WEIGHTS, f"save_strategy: {saves} was given")
    elif "metric_for_best_model" in given and before["metric_for_best_model"] is None:
        refused |= dict.fromkeys(_BEST_WEIGHTS, "metric_for_best_model: null was given")
    elif "metric_for_best_model" in given:
        refused |= dict.fromkeys(_METRIC, "")  # its direction is known
    return refused
