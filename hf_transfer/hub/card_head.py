"""The head in a model card: how it was solved for, and what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hf_transfer.hub.card_markdown import escape
from hf_transfer.run_folder import refitted


def paragraphs(results: Mapping[str, Any], solves: bool) -> Iterator[str]:
    """How the head was solved for, if it was, and what it reads instead of the architecture's own state, if anything.

    Args:
        results: what `results.json` holds.
        solves: whether the solution is what was saved; training began from it otherwise.
    """
    if probe := results.get("probe"):
        yield (
            f"The head {'was fitted' if solves else 'was initialized by fitting it'} to the frozen features with an L2 "
            f"penalty of {probe['l2']:.2g} (for features of variance 1), which has the best {escape(probe['measure'])} "
            f"in {probe['held_out']} among {probe['l2_grid'][-1]:.2g} to {probe['l2_grid'][0]:.2g}: "
            f"{probe['score']:.4f}.{_again(results)}"
        )
    if change := results.get("pooling"):
        yield _pooling(change, results)
    if (again := refitted(results)) and "trainings" in again:
        yield (
            f"The weights are the mean of {again['trainings']} trainings from the same beginning (Wortsman et al. "
            "2022), each of which held out other examples."
        )


def _again(results: Mapping[str, Any]) -> str:
    again = refitted(results)
    if not again:
        return ""
    return (
        f" After the validation split was measured, it was fitted again with the same penalty to all "
        f"{again['examples']:,} examples, the {again['held_out']:,} held out for validation too."
    )


def _pooling(change: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What the head reads instead of the architecture's own state."""
    chosen = " (chosen by cross-validation on the training data)" if results.get("pooling_candidates") else ""
    if "layer" in change:
        what = {"cls": "the class token", "mean": "the mean", "max": "the maximum"}[change["pooling"]]
        dropped = f" The layers above it were left out ({', '.join(change['dropped'])})." if change["dropped"] else ""
        if layers := change.get("layers"):  # of an earlier version there are none
            how = "and is the average of one linear head on each, as one layer" if results.get("probe") else "together"
            return f"The head reads {what} of {', '.join(f'`{name}`' for name in layers)}, {how}.{dropped}"
        return f"The head reads {what} of `{change['layer']}`{chosen}.{dropped}"
    layer = f"layer {change['kept']}" if change["kept"] else "the embeddings"
    how = f", computed by an added layer, `{change['added']}`, which trains like the others" if change["added"] else ""
    dropped = f" The {change['dropped']} layers above it were left out." if change["dropped"] else ""
    return f"The head reads the mean over the tokens of {layer}{chosen}{how}.{dropped}"
