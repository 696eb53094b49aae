"""What became of domain adaptation, in words, from the section `domain_adaptation` of `results.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hf_transfer.config.arguments.adaptation import NONE, RAMP
from hf_transfer.layers.architectures import HEAD

KEY = "domain_adaptation"  # in `results.json`


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Sentences without a full stop; none for a run without a target, and for a run of an earlier version.

    Args:
        results: what `results.json` holds.
    """
    found = results.get(KEY)
    if not found:
        return
    examples, labeled = found["target"]["examples"], found["target"].get("labeled", 0)
    labels = f"target examples, {labeled:,} of them labeled" if labeled else "unlabeled target examples"
    yield f"Domain adaptation: {_how(found)}; {examples:,} {labels}"
    if found["selection"]:
        yield from _selection(found["selection"], examples, labeled)
    if results["metrics_split"] == "validation":
        yield (
            "The validation split is of the source and says nothing about the target: for the accuracy on the target, "
            "give labeled examples of it as test_file"
        )


def _how(found: Mapping[str, Any]) -> str:
    if found["method"] == NONE:
        return (
            f"none, trained on the source {'and labels of the target' if found['target'].get('labeled') else 'alone'}"
        )
    if "frozen" in found:
        return f"{found['method']} of frozen features"
    if "rounds" in found:
        return f"{found['method']}, {_rounds(found['rounds'])}"
    grown = ", grown from 0" if found["schedule"] == RAMP else ""
    layer = "what the head reads" if found["layer"] == HEAD else f"the mean output of {found['layer']}"
    value = "" if found["penalty"] is None else f", {found['penalty']:.4g} in the last epoch"
    return f"{found['method']} on {layer}, weight {found['weight']:g}{grown}{value}"


def _rounds(rounds: Any) -> str:
    """What came of self-training."""
    if not rounds:
        return "ended before the first round"
    last = rounds[-1]
    labeled, examples = (sum(last[name].values()) for name in ("labeled", "answered"))
    if last["collapsed"]:
        most = max(last["answered"].items(), key=lambda one: one[1])
        return (
            f"stopped in round {last['number']} because the answers on the target fell into too few classes "
            f"({most[1]:,} of {examples:,} were {most[0]}), then trained on the source alone"
        )
    return f"{labeled:,} of {examples:,} examples labeled in round {last['number']}, the last"


def named(method: str, has_labels: bool) -> str:
    """A candidate of `auto`; `has_labels`: whether all of them were trained on labels of the target too."""
    if method != NONE:
        return method
    return "source and target labels only" if has_labels else "source only"


def _selection(found: Mapping[str, Any], examples: int, labeled: int) -> Iterator[str]:
    """What the model was chosen from, and why none of the others.

    Args:
        found: the choice.
        examples: of the target.
        labeled: those of them that every candidate was trained on.
    """
    chosen, count = found["chosen"], len(found["candidates"])
    without = f"trained on the source {'and labels of the target ' if labeled else ''}alone"
    kept = f"the model {without} was kept" if chosen == NONE else f"{chosen} was kept"
    by = f"without labels of the target, by {found['by']}"
    if labeled:
        on = "the same examples" if labeled == examples else "the others, without labels"
        by = f"all trained on {labeled:,} labels of the target, by {found['by']} on {on}"
    yield f"domain_adaptation: auto compared {count} models {by}; {kept}"
    for one in found["candidates"]:
        scores = one["validators"]
        numbers = "" if scores is None else f"{found['by']} {scores[found['by']]:.4f}"
        accuracy = "" if scores is None else f"source accuracy {scores['source_accuracy']:.4f}"
        name = named(one["method"], labeled > 0)
        yield f"  {name}: {', '.join(filter(None, [numbers, accuracy, one['why_not'] or 'kept']))}"
