"""The Gradio page of `demo`. Imported by the verb and by a Space's `app.py` only: it needs Gradio."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from hf_transfer.config.arguments.explaining import is_installed
from hf_transfer.config.arguments.serving import MEGABYTE, Limits
from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.errors import UserError
from hf_transfer.inference.explanations import ImageExplanation, TextExplanation, overlay
from hf_transfer.inference.predictor import Predictor
from hf_transfer.inference.questions import Refused, check_image, examples, raw_text
from hf_transfer.inference.samples import Sample
from hf_transfer.inference.served import Served

OFF = "off"
COVERAGES = (0.8, 0.9, 0.95)
_SHOWN = 10  # probabilities, the highest first
_KEPT = (3600, 86400)  # seconds: how often uploads are looked through, and how old they may get
_SYSTEM = ["system-ui", "sans-serif"]  # fonts of the visitor's own: none is loaded


@dataclass(frozen=True)
class Page:
    """A page on the tasks of a bank or a run.

    Attributes:
        served: the tasks, which all read texts or all read images.
        samples: of each task, examples to click on.
        title: heading.
        limits: what an input may hold.
    """

    served: Served
    samples: Mapping[str, Sequence[Sample]]
    title: str
    limits: Limits = field(default_factory=Limits)

    def launch(self, **keys: Any) -> gr.Blocks:
        """Build the page and show it.

        Args:
            **keys: of Gradio's `launch`, for example `server_port`.
        """
        page = self.build()
        images = {str(Path(s.values[0]).parent) for some in self.samples.values() for s in some if self.reads_images}
        page.launch(
            share=False,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            footer_links=[],
            max_file_size=int(self.limits.max_request_mb * MEGABYTE),
            allowed_paths=sorted(images),
            theme=gr.themes.Default(font=_SYSTEM, font_mono=["ui-monospace", "monospace"]),
            **keys,
        )
        return page

    @property
    def reads_images(self) -> bool:
        return bool(next(iter(self.served.predictors.values())).task.suffixes)

    def build(self) -> gr.Blocks:
        """The page, for `launch` or for an application of your own."""
        first = self.served.names[0]
        with gr.Blocks(title=self.title, analytics_enabled=False, delete_cache=_KEPT) as page:
            gr.Markdown(f"# {self.title}")
            several = len(self.served.names) > 1
            task = gr.Dropdown(list(self.served.names), value=first, label="Task", visible=several, elem_id="task")
            with gr.Row():
                with gr.Column():
                    inputs = self._inputs(first)
                    coverage = self._coverage(first)
                    with gr.Row():
                        ask = gr.Button("Predict", variant="primary", elem_id="predict")
                        why = gr.Button("Explain", visible=is_installed(), elem_id="explain")
                with gr.Column():
                    note = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
                    scores = gr.Label(
                        label="Probabilities", num_top_classes=_SHOWN, show_heading=False, elem_id="probabilities"
                    )
                    explanation = self._explanation()
            shown = self._examples(first)
            given, answered = [task, *inputs, coverage], [note, scores, explanation]
            lock = threading.Lock()  # a tokenizer serves one thread at a time

            def answer(*words: Any) -> tuple[str, Any, Any]:
                with lock:
                    return (*self._answer(*words), gr.update(value=None, visible=False))

            def explain(*words: Any) -> tuple[str, Any, Any]:
                with lock:
                    return (*self._answer(*words), self._explained(*words))

            gr.on([ask.click, *(one.submit for one in inputs if hasattr(one, "submit"))], answer, given, answered)
            why.click(explain, given, answered)
            coverage.input(answer, given, answered)
            if several:
                second, setting, table = inputs[-1], coverage, shown
                changed = task.input(self._switched, [task], [second, setting, table])
                changed.then(answer, given, answered)
            shown.click(self._chosen, [task, shown], inputs).then(answer, given, answered)
        return page.queue(default_concurrency_limit=1)

    # ---- parts ----

    def _inputs(self, name: str) -> list[Any]:
        """One component per input column: an image; or a text, and a second for tasks that read pairs."""
        if self.reads_images:
            # The file as it was uploaded: any other setting would decode it here.
            image = gr.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Image",
                height=240,
                elem_id="image",
            )
            return [image]
        pair = self.served[name].is_pair
        text = gr.Textbox(lines=3, max_length=self.limits.max_characters, label=_title(self, name, 0), elem_id="text")
        if not any(predictor.is_pair for predictor in self.served.predictors.values()):
            return [text]
        other = gr.Textbox(
            lines=3,
            max_length=self.limits.max_characters,
            label=_title(self, name, 1),
            visible=pair,
            elem_id="second",
        )
        return [text, other]

    def _coverage(self, name: str) -> Any:
        choices = coverages(self.served[name])
        return gr.Radio(
            [OFF, *choices],
            value=OFF,
            label="Abstain",
            info="Answer with the set of labels that contains the true one with this probability; abstain unless it "
            "has exactly one.",
            visible=bool(choices),
            elem_id="abstain",
        )

    def _explanation(self) -> Any:
        if self.reads_images:
            return gr.Image(
                label="What it rests on",
                visible=False,
                interactive=False,
                height=240,
                buttons=[],
                elem_id="explanation",
            )
        return gr.HTML(visible=False, elem_id="explanation")

    def _examples(self, name: str) -> Any:
        some = self.samples.get(name, ())
        component = gr.Image(type="filepath", visible=False) if self.reads_images else gr.Textbox(visible=False)
        label = gr.Textbox(visible=False)
        return gr.Dataset(
            components=[component, label],
            headers=["image" if self.reads_images else "text", "label"],
            samples=[_row(sample) for sample in some],
            type="index",
            label="Examples that the run held out",
            visible=bool(some),
            elem_id="examples",
        )

    # ---- events ----

    def _switched(self, name: str) -> tuple[Any, Any, Any]:
        """Updates of the second text, the coverages and the examples, for another task."""
        some, choices = self.samples.get(name, ()), coverages(self.served[name])
        second = gr.skip() if self.reads_images else gr.update(label=_title(self, name, 0))
        if not self.reads_images and any(predictor.is_pair for predictor in self.served.predictors.values()):
            second = gr.update(label=_title(self, name, 1), visible=self.served[name].is_pair)
        return (
            second,
            gr.update(choices=[OFF, *choices], value=OFF, visible=bool(choices)),
            gr.update(samples=[_row(sample) for sample in some], visible=bool(some)),
        )

    def _chosen(self, name: str, index: int) -> Any:
        """The values of a sample, for the inputs."""
        values = [str(value) for value in self.samples[name][index].values]
        if self.reads_images or not any(predictor.is_pair for predictor in self.served.predictors.values()):
            return values[0]
        return [*values, ""][:2]

    def _answer(self, name: str, *given: Any) -> tuple[str, Any]:
        """(the answer in words, the probabilities) for the components' values; blank without an input."""
        *values, coverage = given
        nothing = gr.update(value=None)
        if not any(values):
            return "", nothing
        try:
            predictor = self.served[name]
            predictor = predictor if coverage == OFF else predictor.abstaining(float(coverage.rstrip("%")) / 100)
            (answer,) = predictor.stream(examples(predictor, [self._read(predictor, values)]))
        except (Refused, UserError) as error:
            return str(error), nothing
        if "error" in answer:
            return f"It cannot be read: {answer['error'].rstrip('.')}.", nothing
        return in_words(answer, predictor.labels.problem_type, coverage), answer.get("scores", nothing)

    def _explained(self, name: str, *given: Any) -> Any:
        """An update of the explanation: a marked text, or a heatmap over the image; of what has no answer, none."""
        *values, _ = given
        predictor = self.served[name]
        try:
            (read,) = examples(predictor, [self._read(predictor, values)]) if any(values) else (None,)
            if read is None or "error" in next(iter(predictor.stream([read]))):
                return gr.update(value=None, visible=False)
            (found,) = predictor.explanations([read])
        except Refused:  # which the answer says
            return gr.update(value=None, visible=False)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if isinstance(found, ImageExplanation):
            return gr.update(value=overlay(found.view, found.heatmap), visible=True)
        assert isinstance(found, TextExplanation)
        return gr.update(value=found._repr_html_(), visible=True)

    def _read(self, predictor: Predictor, values: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Raises:
        Refused: the input exceeds a limit, or is no image.
        """
        if self.reads_images:
            content = Path(values[0]).read_bytes()
            check_image("The image", content, self.limits)
            return None, [content]
        texts = list(values) if predictor.is_pair else values[0]
        return raw_text(texts, "The text", predictor, self.limits)


def coverages(predictor: Predictor) -> list[str]:
    """The coverages for which a model has prediction sets, in percent; none where it cannot abstain."""
    possible = []
    for coverage in COVERAGES:
        try:
            predictor.abstaining(coverage)
        except UserError:
            continue
        possible.append(f"{coverage:.0%}")
    return possible


def in_words(answer: Mapping[str, Any], problem_type: str, coverage: str) -> str:
    """What an answer says, in a line."""
    if problem_type == REGRESSION:
        return f"{answer['value']:.6g}"
    if problem_type == MULTI_LABEL:
        return ", ".join(answer["labels"]) or "none of the labels"
    if answer.get("abstains"):
        among = f"one of {', '.join(answer['set'])}" if answer["set"] else "no label is likely enough"
        return f"abstains: {among} ({coverage} coverage)"
    return f"{answer['label']} ({answer['score']:.1%})"


def _title(page: Page, name: str, place: int) -> str:
    """What stands over the text of an input column."""
    columns = page.served[name].columns
    return columns[place] if len(columns) > place else "text"


def _row(sample: Sample) -> list[str]:
    """A sample as a row of the table of examples."""
    return [" | ".join(map(str, sample.values)), sample.label]
