"""A model card of averaged weights: which models they are of, how these were chosen, the curve of an interpolation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_transfer.errors import listed
from hf_transfer.hub.card_markdown import escape, key_value, table
from hf_transfer.run_folder import INTERPOLATION_PNG

SOUP, INTERPOLATION = "soup", "interpolation"
_SOUPS, _WISE = "https://arxiv.org/abs/2203.05482", "https://arxiv.org/abs/2109.01903"
_GREEDY = (
    "in the order of their validation `{metric}`, each model joined if the average did not get worse by it (greedy)"
)


def is_average(results: Mapping[str, Any]) -> bool:
    """Whether a model was made from the weights of others (`hf-transfer soup`)."""
    return bool(results.get(SOUP) or results.get(INTERPOLATION))


def tag(results: Mapping[str, Any]) -> str | None:
    """A tag for the hub; None for a model that was trained."""
    return "model-soup" if results.get(SOUP) else "weight-interpolation" if results.get(INTERPOLATION) else None


def summary(results: Mapping[str, Any]) -> str:
    """A sentence on where the weights are from."""
    if soup := results.get(SOUP):
        count, every = sum(one["chosen"] for one in soup["candidates"]), len(soup["candidates"])
        return f"Its weights are the mean of those of {count} of {every} models ({escape(soup['method'])} soup)."
    alpha = results[INTERPOLATION]["alpha"]
    return (
        f"Its weights lie between the pretrained and the fine-tuned ones: {1 - alpha:g} · pretrained + {alpha:g} · "
        "fine-tuned."
    )


def section(results: Mapping[str, Any]) -> list[str]:
    """What was averaged, and how it was chosen; empty for a model that was trained."""
    if soup := results.get(SOUP):
        return [*_soup(soup), *_statistics(soup)]
    if found := results.get(INTERPOLATION):
        return [*_interpolation(found), *_statistics(found)]
    return []


def limitation(results: Mapping[str, Any]) -> str:
    """What the choice means for the metrics."""
    split = (
        "the validation split" if results["metrics_split"] == "validation" else f"the {results['metrics_split']} split"
    )
    same = ", on which this was chosen, and are optimistic" if results["metrics_split"] == "validation" else ""
    return f"The results are of a single average, measured on {split}{same}; other seeds give different results."


def _soup(soup: Mapping[str, Any]) -> Iterator[str]:
    metric, candidates = soup["metric"], soup["candidates"]
    how = _GREEDY.format(metric=metric) if soup["method"] == "greedy" else "all of them (uniform)"
    yield f"The mean of the weights of several models ([Wortsman et al. 2022]({_SOUPS})): {how}."
    yield ""
    differs = any(one.get("keys") for one in candidates)
    head = ("model", f"validation `{metric}`", "averaged", *(["differs in"] if differs else []))
    rows = [
        (
            escape(_shown(one["name"])),
            _number(one["metrics"][metric]),
            "yes" if one["chosen"] else "no",
            *([_keys(one["keys"])] if differs else []),
        )
        for one in candidates
    ]
    yield from table(head, rows)
    yield ""
    yield (
        f"Validation `{metric}` of the average: {_number(soup['value'])}; of the best single model: "
        f"{_number(soup['best_single'])}. Both are the best of several on these examples, and therefore optimistic."
        if soup["method"] == "greedy"
        else f"Validation `{metric}` of the average: {_number(soup['value'])}; of the best single model, which is the "
        f"best of several on these examples: {_number(soup['best_single'])}."
    )
    if any(one.get("adapter", "none") != "none" for one in candidates):
        yield "Adapters were merged into the weights first, so that their updates were averaged."


def _interpolation(found: Mapping[str, Any]) -> Iterator[str]:
    metric, old, alpha = found["metric"], found["old_task"], found["alpha"]
    yield (
        f"(1 - alpha) · pretrained + alpha · fine-tuned weights ([Wortsman et al. 2022]({_WISE})). Alpha "
        f"{alpha:g} was kept: {escape(found['rule'])}."
    )
    if new := found["fine_tuned_only"]:
        yield f"New in fine-tuning, and the same for every alpha: {listed((f'`{name}`' for name in new), 8)}."
    yield ""
    columns = ["alpha", f"validation `{metric}`"]
    if old:
        columns.append(f"`{old['metric']}` of the old task, {escape(old.get('shown') or _shown(old['dataset']))}")
    rows = []
    for point in found["curve"]:
        values = [point["metrics"][metric], *([point["old_metrics"][old["metric"]]] if old else [])]
        cells = [f"{point['alpha']:g}", *map(_number, values)]
        rows.append([f"**{cell}**" for cell in cells] if point["alpha"] == alpha else cells)
    yield from table(columns, rows)
    yield ""
    yield f"![Metrics by alpha]({INTERPOLATION_PNG})"


def _statistics(found: Mapping[str, Any]) -> Iterator[str]:
    if count := found["recomputed_batchnorm"]:
        yield ""
        yield f"The BatchNorm statistics of {count} layers were computed again, on training examples."


def _shown(name: str) -> str:
    """The last part of a path, of a checkpoint the last two: no more is said of the machine."""
    parts = Path(name).parts
    return "/".join(parts[-2 if re.fullmatch(r"checkpoint-\d+", parts[-1]) else -1 :])


def _keys(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` {escape(key_value(value))}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "NaN" if value is None or value != value else f"{value:.4f}"
