"""`report.html`: one file with everything that a run has to show, which loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hf_transfer.data.labels import SINGLE_LABEL
from hf_transfer.evaluation.curves import draw_curves
from hf_transfer.files import write_bytes, write_text
from hf_transfer.inference.explanations import TEMPLATES as WORDS
from hf_transfer.report.course import frame, stages_of
from hf_transfer.report.figures import png
from hf_transfer.report.result_figures import confusion_figure
from hf_transfer.report.run_files import RunFiles
from hf_transfer.report.sections import filled
from hf_transfer.run_folder import CONFUSION_PNG, CURVES_PNG, REPORT

_TEMPLATES = Path(__file__).parent / "templates"
_IN_NOTEBOOKS = ("result", "curves", "confusion", "classes")


def write(folder: str | Path) -> Path:
    """Write the report of the run in `folder`, and the pictures of its curves and confusion matrix.

    The same files give the same report, byte for byte.

    Raises:
        UserError: `folder` is not that of a run.
    """
    run = RunFiles.read(folder)
    for name, draw in _pictures(run).items():
        write_bytes(run.folder / name, png(draw))
    path = run.folder / REPORT
    write_text(path, html(run))
    return path


def html(run: RunFiles) -> str:
    """The whole page."""
    return _environment().get_template("page.html.j2").render(title=_title(run), sections=filled(run), run=run)


def fragment(run: RunFiles) -> str:
    """The beginning of the page, for a notebook's cell."""
    template = _environment().get_template("fragment.html.j2")
    return template.render(title=_title(run), sections=filled(run, _IN_NOTEBOOKS), run=run)


def _title(run: RunFiles) -> str:
    """Model and data."""
    model = run.results.get("model") or run.keys.get("model_name_or_path") or "a model"
    data = run.results.get("dataset") or run.keys.get("dataset_name") or run.keys.get("train_file") or "data"
    return f"{_short(model)} on {_short(data)}"


def _short(name: Any) -> str:
    """The last part of a path; the whole of a hub id."""
    text = str(name)
    return Path(text).name if text.startswith(("/", ".", "~")) or text.count("/") > 1 else text


def _pictures(run: RunFiles) -> dict[str, Callable[[], Any]]:
    """What draws the pictures next to the report, by name of the file."""
    found: dict[str, Callable[[], Any]] = {}
    if any("loss" in line or "eval_loss" in line for line in run.history):
        found[CURVES_PNG] = lambda: draw_curves(frame(run), stages=stages_of(run))
    if run.problem_type == SINGLE_LABEL and run.results.get("confusion"):
        found[CONFUSION_PNG] = lambda: confusion_figure(run.results["confusion"], run.labels)
    return found


@cache
def _environment() -> Any:
    """The templates, which escape everything that is put into them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([_TEMPLATES, WORDS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
