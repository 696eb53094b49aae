"""What a trained model got wrong, and the course of its training, as pandas frames and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from hf_transfer.config.arguments.explaining import Explaining
from hf_transfer.data.images import undecoded
from hf_transfer.data.labels import SINGLE_LABEL, Labels
from hf_transfer.data.splits import ROW
from hf_transfer.errors import UserError
from hf_transfer.evaluation import metrics
from hf_transfer.evaluation.curves import draw_curves
from hf_transfer.evaluation.mistakes import confusion_frame, mistakes
from hf_transfer.evaluation.thresholds import thresholds_of
from hf_transfer.inference.answering import autocast
from hf_transfer.inference.evaluating import Evaluating
from hf_transfer.inference.explaining import Explainer, index_of
from hf_transfer.inference.explanations import Explanation
from hf_transfer.inference.inputs import Example
from hf_transfer.run_folder import HISTORY


@dataclass
class Reviewing(Evaluating):
    """A model whose answers and training are looked at; see `Predictor`."""

    def confusion_matrix(
        self, data: Any = None, split: str | None = None, max_examples: int | None = None, **keys: Any
    ) -> Any:
        """Counts of examples as a pandas frame, rows true classes and columns predicted ones, with their names.

        Args:
            data: as of `evaluate`, like the others; None takes what the run held out.
            split: likewise.
            max_examples: likewise.
            **keys: likewise.

        Raises:
            UserError: as of `evaluate`; or the model does not predict one of several classes.
        """
        self.check_confusion()
        _, logits, labels = self._answered(data, split, max_examples, keys)
        return confusion_frame(metrics.confusion(SINGLE_LABEL, logits, labels), self.labels.names)

    def check_confusion(self) -> None:
        """Raises:
        UserError: the model does not predict one of several classes.
        """
        if self.labels.problem_type != SINGLE_LABEL:
            raise UserError(
                f"confusion_matrix: it is for one class per example, and the problem type is "
                f"{self.labels.problem_type}.",
                "errors() lists what the model got wrong.",
            )

    def errors(self, data: Any = None, split: str | None = None, max_examples: int | None = None, **keys: Any) -> Any:
        """The wrong answers as a pandas frame, those with the highest loss first; see `errors_frame`.

        Args:
            data: as of `evaluate`, like the others; None takes what the run held out.
            split: likewise.
            max_examples: likewise.
            **keys: likewise.

        Raises:
            UserError: as of `evaluate`.
        """
        held_out, logits, labels = self._answered(data, split, max_examples, keys)
        examples = held_out.examples
        thresholds = thresholds_of(self.model.config)
        return errors_frame(examples, held_out.inputs, self.labels, logits, labels, thresholds)[0]

    def evaluate_with_errors(
        self, data: Any = None, split: str | None = None, max_examples: int | None = None, **keys: Any
    ) -> tuple[dict[str, Any], Any]:
        """(what `evaluate` returns, what `errors` returns), from one pass through the model.

        Args:
            data: as of `evaluate`, like the others; None takes what the run held out.
            split: likewise.
            max_examples: likewise.
            **keys: likewise.

        Raises:
            UserError: as of `evaluate`.
        """
        results, held_out, logits, labels = self._evaluated(data, split, max_examples, keys)
        thresholds = thresholds_of(self.model.config)
        frame, _ = errors_frame(held_out.examples, held_out.inputs, self.labels, logits, labels, thresholds)
        return results, frame

    def explain(self, inputs: Any, label: str | None = None) -> list[Explanation]:
        """What each answer rests on, in order: the words of a text, or the parts of an image. Needs the package captum.

        Args:
            inputs: as of `predict`.
            label: class to explain instead of the predicted one; of several labels the most probable one is explained.

        Returns:
            `TextExplanation`s or `ImageExplanation`s, each with `save(path)`; a notebook shows them.

        Raises:
            UserError: as of `predict`; captum is missing, there is no such class, or the model cannot be explained.
        """
        return self.explanations(list(self._checked(inputs)), label)

    def explanations(self, examples: Sequence[Example], label: str | None = None) -> list[Explanation]:
        """As `explain`, of examples that have been read.

        Args:
            examples: that can be answered.
            label: as of `explain`.

        Raises:
            UserError: captum is missing, there is no such class, or the model cannot be explained.
        """
        Explaining(explain=".", explain_label=label).check_package(looks_often=self.views.several)
        explain = self.explainer(label)
        answers = [self.window_logits([read.values])[0][0] for read in examples if read.values]
        return [explain(read, logits) for read, logits in zip(examples, answers, strict=True)]

    def explainer(self, label: str | None = None) -> Callable[[Example, Any], Explanation]:
        """A function from an example and its (outputs,) logits to an explanation.

        Args:
            label: as of `explain`.

        Raises:
            UserError: there is no such class, or the model cannot be explained.
        """
        if label is not None:
            index_of(label, self.labels)
        explainer = Explainer(self.task, self.model, self.processor, self.labels)

        def explain(read: Example, logits: Any) -> Explanation:
            with autocast(self.precision, self.model.device):
                return explainer.explain(read.shown, read.values or (), logits, label)

        return explain

    @property
    def history(self) -> Any:
        """What the run logged as a pandas frame, a row per log; learning rates as `learning_rate.<group>`.

        Raises:
            UserError: the model was not loaded from the folder of a run.
        """
        import pandas

        path = self.folder / HISTORY if self.folder is not None else None
        if path is None or not path.is_file():
            place = f"{str(self.folder)!r} has no {HISTORY}" if self.folder else "the model is not in a run's folder"
            raise UserError(f"history: {place}.", "Load the folder of a run.")
        lines = path.read_text(encoding="utf-8").splitlines()
        return pandas.json_normalize([json.loads(line) for line in lines])

    def plot_curves(self) -> Any:
        """A matplotlib figure of the losses and validation metrics by step; `.savefig(path)` writes it.

        Raises:
            UserError: as of `history`; or nothing was logged.
        """
        return draw_curves(self.history)


def errors_frame(
    examples: Dataset, inputs: Sequence[str], labels: Labels, logits: Any, given: Any, thresholds: Sequence[float]
) -> tuple[Any, list[int]]:
    """(the wrong answers as a pandas frame, their positions among the examples).

    Args:
        examples: with the input columns and `ROW`.
        inputs: names of the input columns.
        labels: of the model.
        logits: (examples, outputs) logits.
        given: encoded labels of the examples.
        thresholds: of the labels of a multi-label model.

    The columns are `input` (the text, or the path of an image where it has one), `input_pair` (the second text of a
    pair), `row` in the input data, and those of `evaluation.mistakes` but for `position`.
    """
    import pandas

    found = mistakes(labels.problem_type, logits, given, labels.names, thresholds)
    positions = found.pop("position")
    chosen = undecoded(examples.select(positions), [*inputs, ROW])
    shown = dict(zip(("input", "input_pair"), (_shown(chosen[c][:]) for c in inputs), strict=False))
    return pandas.DataFrame({**shown, "row": chosen[ROW][:], **found}), positions


def errors_csv(frame: Any) -> str:
    """The wrong answers as the text of a CSV file, lists of labels as JSON.

    Args:
        frame: of `errors_frame`, with further columns or without.
    """
    cells = {
        name: [json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in frame[name]]
        for name in ("true", "predicted")
    }
    return str(frame.assign(**cells).to_csv(index=False))


def _shown(cells: Sequence[Any]) -> list[Any]:
    return [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
