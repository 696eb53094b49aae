"""From examples to answers: batches, logits, labels and scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, Labels
from hf_transfer.data.length_windows import TOKENS, WINDOW, window_order
from hf_transfer.errors import UserError
from hf_transfer.evaluation.conformal import in_set
from hf_transfer.evaluation.thresholds import THRESHOLD, thresholds_of
from hf_transfer.inference.exported import check_weights
from hf_transfer.inference.given import Reader
from hf_transfer.inference.inputs import Example, check_inputs, read_inputs
from hf_transfer.layers.groups import layer_groups
from hf_transfer.tasks.base import Task
from hf_transfer.tasks.views import pooled

BATCH_SIZE = 32


@dataclass
class Answering:
    """A model with what it needs to read inputs and to name its answers; see `Predictor`.

    Attributes:
        task: what it reads.
        model: with its head.
        processor: the tokenizer or image processor.
        labels: problem type and names, in the order of the outputs.
        data: the data keys of the run that trained it.
        batch_size: examples per forward pass.
        precision: `bf16` or `fp16` where it was trained and evaluated under autocast, else None.
        seed: of the run's splits.
        views: how it looks at an example.
        limit: largest score of a label in a prediction set (see `evaluation.conformal`); None without sets.
    """

    task: Task
    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    labels: Labels
    data: DataArguments = field(default_factory=DataArguments)
    batch_size: int = BATCH_SIZE
    precision: str | None = None
    seed: int = 0
    views: Views = field(default_factory=Views)
    limit: float | None = None

    def predict(self, inputs: Any, top_k: int | None = None, features: bool = False) -> list[dict[str, Any]]:
        """An answer per input, in order.

        Args:
            inputs: one text (a tuple of two for a pair), one image (bytes, an array or a PIL image), a row as a dict,
                the path of an image, a table, a file of lines or a folder; or several of them in anything that can be
                iterated over: a list, a generator, a `datasets` column or dataset, a pandas Series or DataFrame, a dict
                of columns, an array of texts, (N, H, W, C) or (N, H, W) pixels; or a list of those. A string that names
                an existing file or folder is read.
            top_k: only so many scores, the highest first; None gives all, in the order of the labels.
            features: add what the head receives: one vector per example.

        Returns:
            `{"input", "label", "score", "scores": {label: probability}}`; for several labels `labels` instead of
            `label` and `score`; for a regression `value`. With prediction sets (see `Predictor.abstaining`) also `set`
            and `abstains`; where it abstains, `label` and `score` are None. Where float or 32-bit images have values
            beyond the range of the training data, `clipped_pixels` counts them.

        Raises:
            UserError: an input cannot be read, or is of another kind than the model reads.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k: {top_k} is not positive.")
        return list(self.stream(self._checked(inputs), top_k, features))

    def predict_proba(self, inputs: Any) -> Any:
        """(inputs, labels) probabilities as a float array, the columns in the order of `labels`, as in scikit-learn.

        Rows sum to 1; not of a multi-label model, whose labels are independent.

        Args:
            inputs: see `predict`.

        Raises:
            UserError: as of `predict`; or the model predicts a number.
        """
        if self.labels.problem_type == REGRESSION:
            raise UserError("predict_proba: the model predicts a number, which has no probability.", "Use predict.")
        rows = [list(a["scores"].values()) for a in self.stream(self._checked(inputs))]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.labels.names))

    def _checked(self, inputs: Any) -> Iterator[Example]:
        """The examples of what `predict` is given.

        Raises:
            UserError: one cannot be read.
        """
        for place, read in Reader(self.task, self.data, self.columns).examples(inputs):
            if wrong := self._wrong(read):
                raise UserError(f"{wrong.rstrip('.')}.", key=place)
            yield read

    def _wrong(self, read: Example) -> str:
        """Why an example cannot be answered; empty where it can."""
        if read.values is None:
            return read.error
        if self.columns and len(read.values) != len(self.columns):
            return f"the model reads {' and '.join(self.columns)}: give {'both' if self.is_pair else 'one'}"
        return ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The input columns that the run was trained on; empty where that is not known."""
        named = getattr(self.data, self.task.input_key) if self.task.input_key else None
        return (named,) if isinstance(named, str) else tuple(named or ())

    @property
    def is_pair(self) -> bool:
        return len(self.columns) == 2

    def read(self, words: Sequence[str]) -> Iterator[Example | None]:
        """Examples of what `hf-transfer predict` was given.

        Raises:
            UserError: an input is missing or of the wrong kind.
        """
        check_inputs(words, self.task)
        return read_inputs(words, self.task, self.data)

    def stream(
        self,
        examples: Iterable[Example | None],
        top_k: int | None = None,
        features: bool = False,
        waits: bool = True,
        more: Callable[[Example, Any], dict[str, Any]] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """An answer per example, in order, as soon as a window is full or the source pauses (None).

        One that cannot be read is answered with its `error`.

        Args:
            examples: to answer.
            top_k: as of `predict`.
            features: likewise.
            waits: whether a window is that of `data.length_windows`, where texts of like length share a batch; if not,
                it is a batch.
            more: from an example and its (outputs,) logits to what else its answer says; called when that is due.
        """
        most = self._window if waits else self.batch_size
        window: list[Example] = []
        usable = 0
        for item in examples:
            if item is not None:
                if window and len(item.values or ()) != len(window[-1].values or item.values or ()):
                    yield from self._answers(window, top_k, features, more)  # texts and pairs do not share a batch
                    window, usable = [], 0
                window.append(item)
                usable += not self._wrong(item)
            if window and (item is None or usable == most or len(window) == 2 * most):
                yield from self._answers(window, top_k, features, more)
                window, usable = [], 0
        if window:
            yield from self._answers(window, top_k, features, more)

    @property
    def _window(self) -> int:
        """Examples that are read before the first of them is answered."""
        return self.batch_size * (WINDOW if self.task.pads and not self.views.several else 1)

    def _answers(
        self,
        window: list[Example],
        top_k: int | None,
        features: bool,
        more: Callable[[Example, Any], dict[str, Any]] | None,
    ) -> Iterator[dict[str, Any]]:
        whole = [e for e in window if not self._wrong(e)]
        logits, vectors = self.window_logits([e.values for e in whole if e.values], features) if whole else ([], None)
        answers = {
            id(e): {**self.answer(z, top_k), **self.task.remarks(e.values or (), self.processor)}
            for e, z in zip(whole, logits, strict=True)
        }
        if vectors is not None:
            for e, vector in zip(whole, vectors, strict=True):
                answers[id(e)]["features"] = vector.tolist()
        own = {id(e): z for e, z in zip(whole, logits, strict=True)}
        for e in window:
            answer = {"input": e.shown, **answers.get(id(e), {"error": self._wrong(e)})}
            yield answer | (more(e, own[id(e)]) if more is not None and id(e) in own else {})

    def answer(self, logits: Any, top_k: int | None = None) -> dict[str, Any]:
        """The answer that one example's logits (labels,) stand for."""
        if self.labels.problem_type == REGRESSION:
            return {"value": float(logits[0])}
        several = self.labels.problem_type == MULTI_LABEL
        wide = np.asarray(logits, dtype=np.float64)
        scores = expit(wide) if several else softmax(wide)
        order = np.argsort(-scores, kind="stable")[:top_k] if top_k else range(len(scores))
        named = {"scores": {self.labels.names[i]: float(scores[i]) for i in order}}
        if several:
            limits = thresholds_of(self.model.config) or [THRESHOLD] * len(scores)
            chosen = [n for n, p, t in zip(self.labels.names, scores, limits, strict=True) if p > t]
            return {"labels": chosen, **named}
        best = int(np.asarray(logits).argmax())
        answer = {"label": self.labels.names[best], "score": float(scores[best])}
        return {**answer, **self._set(scores, answer), **named}

    def _set(self, scores: Any, answer: dict[str, Any]) -> dict[str, Any]:
        """The prediction set, the most probable label first; the answer is empty unless the set has one label."""
        if self.limit is None:
            return {}
        members = np.flatnonzero(in_set(scores, self.limit))
        named = [self.labels.names[i] for i in members[np.argsort(-scores[members], kind="stable")]]
        abstains = len(named) != 1
        return {**(dict.fromkeys(answer) if abstains else {}), "set": named, "abstains": abstains}

    @torch.no_grad()
    def window_logits(self, values: Sequence[tuple[Any, ...]], features: bool = False) -> tuple[Any, Any]:
        """As `logits`, of a window of examples, in the batches of training's evaluation.

        Args:
            values: of the examples, in the order of the data; a whole window, or what is left at the end.
            features: as of `logits`.
        """
        if len(values) <= self.batch_size:
            return self.logits(values, features)
        if not self.task.pads or self.views.several:
            parts = [self.logits(values[i : i + self.batch_size], features) for i in self._starts(values)]
        else:
            encoded = self.task.encode(list(zip(*values, strict=True)), self.processor)
            rows = [{k: v[i] for k, v in encoded.items()} for i in range(len(values))]
            order = window_order([len(row[TOKENS]) for row in rows], self.batch_size)
            parts = [
                self._forward([rows[i] for i in order[start : start + self.batch_size]], features)
                for start in self._starts(values)
            ]
        logits, vectors = zip(*parts, strict=True)
        places = np.argsort(order) if self.task.pads and not self.views.several else slice(None)
        return np.concatenate(logits)[places], np.concatenate(vectors)[places] if features else None

    def _starts(self, values: Sequence[Any]) -> range:
        return range(0, len(values), self.batch_size)

    @torch.no_grad()
    def logits(self, values: Sequence[tuple[Any, ...]], features: bool = False) -> tuple[Any, Any]:
        """((examples, labels) logits, (examples, width) features or None) of one batch, computed as in evaluation."""
        columns = list(zip(*values, strict=True))
        encoded, owners = self.task.look(columns, self.processor, self.views, self.data)
        rows = [{k: v[i] for k, v in encoded.items()} for i in range(len(owners))]
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        if len(rows) == len(values):  # as the caller chose the batch
            parts = [rows]
        logits, vectors = zip(*(self._forward(part, features) for part in parts), strict=True)
        logits = pooled(np.concatenate(logits), owners, self.views.pool)
        return logits, pooled(np.concatenate(vectors), owners, "mean") if features else None

    def _forward(self, rows: list[dict[str, Any]], features: bool) -> tuple[Any, Any]:
        device = self.model.device
        batch = {k: v.to(device) for k, v in self.task.collator(self.processor)(rows).items()}
        self.model.eval()
        seen = _Features(self.model) if features else None
        with autocast(self.precision, device), seen or contextlib.nullcontext():
            output = self.model(**batch).logits
        vectors = seen.pooled(batch).float().cpu().numpy() if seen else None
        return output.float().cpu().numpy(), vectors


class _Features:
    """Notes, during a forward pass, what the head receives: the input of its first layer with weights."""

    def __init__(self, model: torch.nn.Module):
        check_weights(model, "features")
        head = {name.rpartition(".")[0] for name in layer_groups(model)[-1].parameters}
        self.model = model
        self.layers = [module for name, module in model.named_modules() if name in head]
        self.seen: torch.Tensor | None = None

    def __enter__(self) -> _Features:
        self.handles = [layer.register_forward_pre_hook(self._note) for layer in self.layers]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.seen is None and inputs and torch.is_tensor(inputs[0]):
            self.seen = inputs[0]

    def pooled(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(examples, width). Where the head classifies every token (decoders), the last one that is no padding."""
        assert self.seen is not None, "the head was not called"
        if self.seen.ndim == 3 and "attention_mask" in batch and self.seen.shape[:2] == batch["attention_mask"].shape:
            places = torch.arange(self.seen.shape[1], device=self.seen.device)
            last = (batch["attention_mask"] * places).argmax(-1)
            return self.seen[torch.arange(len(last), device=last.device), last]
        return self.seen.flatten(1)


def autocast(precision: str | None, device: torch.device) -> Any:
    """The context in which a model computes that was trained under autocast; none without a `precision`."""
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
