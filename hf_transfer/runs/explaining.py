"""`explanations.json`: what the worst mistakes of a run rest on, for its report.

`{"of", "examples"}`: how many of the first rows of `errors.csv` were to be explained, and those that were, in order:
`label` that is explained, its `probability` or the `value` of a regression, `method`, and `picture`, a data URL, or
`words`, for each text a list of [text, value]; empty where the input cannot be read. Or `{"skipped": reason}`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer.config.arguments.explaining import INSTALL, PACKAGE, is_installed
from hf_transfer.data.images import data_url, undecoded
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError, one_line
from hf_transfer.files import write_json
from hf_transfer.inference.explanations import Explanation, ImageExplanation, TextExplanation, overlay
from hf_transfer.inference.inputs import example
from hf_transfer.inference.predictor import Predictor
from hf_transfer.layers.forward_pass import REFUSALS
from hf_transfer.report.run_files import RunFiles
from hf_transfer.run_folder import EXPLANATIONS
from hf_transfer.runs.prepare import Prepared

MOST = 8  # mistakes
_SECONDS = 5.0  # after which no other mistake is begun
_SIDE = 192  # most pixels per side of a picture
_WORDS = 300  # of a text


def write_explanations(prepared: Prepared, predictor: Predictor, folder: Path) -> None:
    """Write it, if there are mistakes.

    Args:
        prepared: the run's data.
        predictor: the trained model at work.
        folder: of the run.
    """
    run = RunFiles.read(folder)
    rows = [int(row["row"]) for row in run.errors[:MOST]]
    if not rows:
        return
    if not is_installed():
        write_json(folder / EXPLANATIONS, {"skipped": f"it needs {PACKAGE} ({INSTALL})"})
        return
    begun = time.perf_counter()
    split = prepared.data.splits[run.split]
    places = {row: place for place, row in enumerate(split[ROW][:])}
    cells = undecoded(split.select([places[row] for row in rows]), prepared.inputs)
    columns = [cells[column][:] for column in prepared.inputs]
    try:
        explain, entries = predictor.explainer(), list[dict[str, Any]]()
        for values in zip(*columns, strict=True):
            if time.perf_counter() - begun > _SECONDS:
                break
            read = example(predictor.task, None, values)
            if read.values is None:  # its file is gone
                entries.append({})
                continue
            entries.append(_entry(explain(read, predictor.window_logits([read.values])[0][0])))
    except (UserError, *REFUSALS) as error:
        write_json(folder / EXPLANATIONS, {"skipped": one_line(error)})
        return
    write_json(folder / EXPLANATIONS, {"of": len(rows), "examples": entries})


def _entry(found: Explanation) -> dict[str, Any]:
    about: dict[str, Any] = {
        "label": found.label,
        "probability": found.probability,
        "value": found.value,
        "method": found.method,
    }
    if isinstance(found, ImageExplanation):
        gap = np.full((len(found.view), max(2, len(found.view) // 24), 3), 255, dtype=np.uint8)
        both = (found.view, gap, np.asarray(overlay(found.view, found.heatmap)))
        return about | {"picture": data_url(np.concatenate(both, axis=1), 2 * _SIDE)}
    assert isinstance(found, TextExplanation)
    return about | {"words": [_shown(words) for words in found.words]}


def _shown(words: Sequence[Any]) -> list[tuple[str, float | None]]:
    """The first words of a text; without what was not read."""
    return [(word.text, word.value) for word in words if word.value is not None][:_WORDS]
