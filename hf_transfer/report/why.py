"""The section on what the worst mistakes rest on: marked words, or heatmaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_transfer.data.labels import REGRESSION
from hf_transfer.inference.explanations import marked, strongest
from hf_transfer.inference.marked_words import Word
from hf_transfer.report.blocks import Block, Card, Cards, Text
from hf_transfer.report.examples import answer, picture
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.words import number, percent


def explanations(run: RunFiles) -> list[Block] | None:
    """The first of the mistakes, with what speaks for the answer of the model."""
    found = run.explanations
    if not found:
        return None
    if reason := found.get("skipped"):
        return [Text(f"Not explained: {str(reason).rstrip('.')}.", "muted")]
    shown = [(row, entry) for row, entry in zip(run.errors, found["examples"], strict=False) if entry]
    if not shown:
        return [Text("Not explained: explaining the first mistake would have taken too long.", "muted")]
    is_text = "words" in shown[0][1]
    aim = "a higher value" if run.problem_type == REGRESSION else "the class that is explained"
    what = (
        f"Blue words speak for {aim}, orange words against it, the darkest most"
        if is_text
        else f"At the left what the model saw; at the right what speaks for {aim}, the brightest most"
    )
    lines = [f"{what}, by {shown[0][1]['method']}."]
    if len(shown) < found["of"]:
        lines.append(f"{len(shown)} of {found['of']} were explained: a report may take a few seconds only.")
    return [Text(" ".join(lines), "muted"), Cards([_card(run, row, entry) for row, entry in shown])]


def _card(run: RunFiles, row: Mapping[str, str], entry: Mapping[str, Any]) -> Card:
    lines = [("true", answer(run, row["true"])), ("predicted", answer(run, row["predicted"]))]
    if entry["probability"] is not None:
        lines.append(("explained", f"{entry['label']}, {percent(entry['probability'])}"))
    else:
        lines.append(("explained", f"{entry['label']}, {number(entry['value'], '.4g')}"))
    texts = [[Word(str(text), value) for text, value in words] for words in entry.get("words") or ()]
    most = strongest(word for words in texts for word in words)
    place = f"{row['input']}, row {row['row']}" if not texts and row.get("input") else f"row {row['row']}"
    return Card(place, lines, picture(entry.get("picture")), words=[marked(words, most) for words in texts])
