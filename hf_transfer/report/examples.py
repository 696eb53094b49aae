"""Sections on examples: mistakes, labels that look wrong, what the model saw, and facts about the data."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_transfer.data.images import data_url
from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.errors import shortened
from hf_transfer.report.blocks import Block, Card, Cards, Cell, Near, Picture, Table, Text
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.words import NOTHING, count, number, percent
from hf_transfer.run_folder import ERRORS, LABEL_ISSUES, TRAIN_BATCH_PNG

_LENGTH = 600  # characters of a text
_MOST_CLASSES = 40  # rows of the table of classes
_OF_ISSUES = ("place", "verdict", "given", "suggested", "probability", "score")  # the columns that are no inputs
_SIDE = 160  # most pixels per side of a picture whose label looks wrong
_WIDEST, _QUALITY = 900, 82  # of the picture of a batch, in pixels and percent


def mistakes(run: RunFiles) -> list[Block] | None:
    """The wrong answers with the highest loss, with the training examples most like them."""
    shown = cards(run)
    if not shown:
        return None
    what = "answers that are furthest off" if run.problem_type == REGRESSION else "wrong answers with the highest loss"
    lines = [f"The {what} on {run.split}. {ERRORS} has all of them."]
    if any(card.near for card in shown):
        lines.append("Next to each, the training examples that the pretrained model finds most similar.")
    if any(card.picture is None and not card.text for card in shown):
        lines.append("A picture that is missing could not be read any more.")
    return [Text(" ".join(lines), "muted"), Cards(shown)]


def cards(run: RunFiles) -> list[Card]:
    """The first rows of `errors.csv` with what `mistakes.json` has of them."""
    more = [*run.mistakes, *[{}] * len(run.errors)]
    return [_card(run, row, more[index]) for index, row in enumerate(run.errors)]


def _card(run: RunFiles, row: Mapping[str, str], more: Mapping[str, Any]) -> Card:
    own = row.get("input") or ""
    has_picture = "picture" in more and more["picture"] is not None
    is_picture = has_picture or run.results.get("task") == "image-classification"
    text = "" if is_picture else " / ".join(filter(None, [own, row.get("input_pair") or ""]))
    place = f"row {row.get('row', '')}" if not (is_picture and own) else f"{own}, row {row.get('row', '')}"
    lines = [("true", answer(run, row["true"])), ("predicted", answer(run, row["predicted"]))]
    if row.get("probability"):
        lines.append(("probability", percent(_float(row["probability"]))))
    loss = "squared error" if run.problem_type == REGRESSION else "loss"
    lines.append((loss, number(_float(row.get("loss")), ".3g")))
    near = [
        Near(
            str(one["place"]),
            f"{answer(run, str(one['label']))}, similarity {number(one['cosine'], '.2f')}",
            picture(one.get("picture")),
            shortened(one.get("text") or "", 160),
        )
        for one in more.get("nearest") or ()
    ]
    return Card(place, lines, picture(more.get("picture")), shortened(text, _LENGTH), near)


def _float(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def picture(source: Any) -> str | None:
    """A data URL; None for anything else, which the page would have to load."""
    return source if isinstance(source, str) and source.startswith("data:image/") else None


def answer(run: RunFiles, cell: str) -> str:
    """A cell of `errors.csv` for display; several labels are JSON there."""
    if run.problem_type == MULTI_LABEL:
        try:
            return ", ".join(map(str, json.loads(cell))) or "no label"
        except ValueError:
            return cell
    value = _float(cell) if run.problem_type == REGRESSION else None
    return number(value, ".4g") if value is not None else cell


def label_issues(run: RunFiles) -> list[Block] | None:
    """Labels that look wrong, in the whole data."""
    found = run.results.get("label_issues")
    if not run.label_issues:
        return [Text(f"Not looked for: {found['skipped']}", "muted")] if found and found.get("skipped") else None
    total = (found or {}).get("wrong", 0) + (found or {}).get("doubtful", 0)
    about = f"{count(total)} labels look wrong or doubtful" if total else "Labels that look wrong or doubtful"
    said = Text(f"{about}, the likeliest errors first. {LABEL_ISSUES} has all of them.", "muted")
    if run.results.get("task") == "image-classification":
        return [said, Cards([_issue(row) for row in run.label_issues])]
    rows = [
        (
            row["place"],
            row["given"],
            row["suggested"],
            shortened(" / ".join(_inputs(row)), 160),
            row["verdict"],
            row["probability"],
        )
        for row in run.label_issues
    ]
    head = ("place", "given", "suggested", "input", "verdict", "probability of the label")
    return [said, Table(head, rows, words=5)]


def _inputs(row: Mapping[str, str]) -> list[str]:
    """The inputs in a row of `label_issues.csv`: text, or the path of a picture."""
    return [str(value) for name, value in row.items() if name not in _OF_ISSUES and value]


def _issue(row: Mapping[str, str]) -> Card:
    """A label of a picture, which is shown if its file is still there."""
    path = next(iter(_inputs(row)), "")
    lines = [("given", row["given"]), ("suggested", row["suggested"]), ("probability", row["probability"])]
    lines.append(("verdict", row["verdict"]))
    return Card(path or row["place"], lines, data_url(path, _SIDE) if path else None)


def inputs(run: RunFiles) -> list[Block] | None:
    """Training examples as the model saw them."""
    path = run.folder / TRAIN_BATCH_PNG
    if not path.is_file():
        return None
    is_text = run.results.get("task") == "text-classification"
    about = "tokens of training texts" if is_text else "training images, augmented and cropped; one row per image"
    return [Picture(small_picture(path), about), Text(f"What the model read: {about}.", "muted")]


def small_picture(path: Path) -> str:
    """A picture as a data URL, small enough for a page."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
        image.thumbnail((_WIDEST, 4 * _WIDEST))
        file = io.BytesIO()
        image.save(file, format="jpeg", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


# ---- data ----------------------------------------------------------------------------------------------------------


def data(run: RunFiles) -> list[Block] | None:
    """Splits, classes, duplicates and leaks."""
    facts = run.results.get("data_facts")
    if not facts:
        return None
    splits = facts["splits"]
    rows = [
        (
            name,
            count(split["examples"]),
            count(split["duplicates"]["exact"]) if split.get("examined") else NOTHING,
            count(split["duplicates"]["near"]) if split.get("examined") else NOTHING,
            count(split.get("conflicts")) if split.get("examined") else NOTHING,
        )
        for name, split in splits.items()
    ]
    head = ("split", "examples", "exact duplicates", "near-duplicates", "conflicting labels")
    blocks: list[Block] = [Table(head, rows)]
    blocks += [Text(text, "warning") for text in _doubts(facts)]
    for what, (low, median, p95, high) in (splits.get("train", {}).get("sizes") or {}).items():
        sizes = f"{low:,.0f} to {high:,.0f}, median {median:,.0f}, 95th percentile {p95:,.0f}"
        blocks.append(Text(f"Training examples in {what}: {sizes}."))
    blocks += [Text(str(text), "muted") for text in facts.get("decided") or ()]
    return [*blocks, *_classes(run, splits)]


def _doubts(facts: Mapping[str, Any]) -> list[str]:
    found = []
    for leak in facts.get("leaks") or ():
        removed = " They were removed." if facts.get("dropped") else ""
        found.append(
            f"{count(leak['exact'] + leak['near'])} {leak['kept']} examples also appear in {leak['other']}.{removed}"
        )
    if facts.get("bad"):
        found.append(f"{len(facts['bad']):,} unusable examples were left out, as far as they are listed.")
    cut = facts.get("cut")
    if cut and cut[0]:
        found.append(
            f"{percent(cut[0])} of sampled training texts are longer than {count(cut[1])} tokens, and truncated."
        )
    if (facts.get("imbalance") or 1) > 10:
        found.append(
            f"The largest class has {count(facts['imbalance'])} times as many training examples as the smallest."
        )
    return found + [str(misfit["text"]) for misfit in facts.get("misfits") or ()]


def _classes(run: RunFiles, splits: Mapping[str, Any]) -> list[Block]:
    """Examples of each class in each split."""
    names = list((splits.get("train") or {}).get("classes") or ())
    if not names:
        return []
    largest = {split: max([*found["classes"].values(), 1]) for split, found in splits.items()}
    rows = [
        (name, *(_bar(found["classes"].get(name, 0), largest[split]) for split, found in splits.items()))
        for name in names
    ]
    head = ("class", *splits)
    folded = f"All {len(rows):,} classes" if len(rows) > _MOST_CLASSES else ""
    return [Table(head, rows, folded=folded)]


def _bar(amount: int, largest: int) -> Cell:
    return Cell(count(amount), amount / largest)
