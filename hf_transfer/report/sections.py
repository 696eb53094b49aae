"""The sections of a report, in their order. A new part is a function and a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_transfer.errors import one_line
from hf_transfer.report import about, answers, course, examples, other_data, probabilities, why
from hf_transfer.report.blocks import Block, Text
from hf_transfer.report.run_files import RunFiles


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: in addresses on the page.
        title: heading.
        make: from the run's files to what the part consists of; None if the run has nothing of the kind.
    """

    name: str
    title: str
    make: Callable[[RunFiles], list[Block] | None]


SECTIONS = (
    Section("result", "Result", answers.result),
    Section("curves", "Learning curves", course.curves),
    Section("layers", "Layers and learning rates over time", course.layers),
    Section("cache", "What was computed once", course.cache),
    Section("confusion", "Confusion matrix", answers.confusion),
    Section("classes", "By class", answers.classes),
    Section("values", "Predicted and true values", probabilities.values),
    Section("calibration", "Calibration", probabilities.calibration),
    Section("abstaining", "Accuracy if unsure answers are withheld", probabilities.abstaining),
    Section("thresholds", "Thresholds", probabilities.thresholds),
    Section("mistakes", "Mistakes", examples.mistakes),
    Section("why", "What the worst mistakes rest on", why.explanations),
    Section("labels", "Labels that look wrong", examples.label_issues),
    Section("domains", "Distance to the target domain", other_data.domains),
    Section("forgetting", "What became of the old task", other_data.forgetting),
    Section("inputs", "What the model saw", examples.inputs),
    Section("data", "Data", examples.data),
    Section("cost", "Cost", about.cost),
    Section("environment", "Environment", about.environment),
    Section("loading", "How to use it", about.loading),
)


@dataclass(frozen=True)
class Filled:
    """A section with its contents."""

    name: str
    title: str
    blocks: Sequence[Block]


def filled(run: RunFiles, names: Sequence[str] = ()) -> list[Filled]:
    """The sections that a run has something for.

    What an older version wrote may lack what a section reads: it then says so, and the others are whole.

    Args:
        run: its files.
        names: of the sections that are wanted (default: all).
    """
    found = []
    for section in SECTIONS:
        if names and section.name not in names:
            continue
        try:
            blocks = section.make(run)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {one_line(error, 120)}"
            blocks = [Text(f"The files of this run do not have what is shown here ({what}).", "warning")]
        if blocks:
            found.append(Filled(section.name, section.title, blocks))
    return found
