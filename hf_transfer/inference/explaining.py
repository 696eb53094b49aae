"""Why a model answers as it does: the words of a text, or the parts of an image, that an answer rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from torch.nn import functional

from hf_transfer.data.augment import statistics
from hf_transfer.data.labels import REGRESSION, SINGLE_LABEL, Labels
from hf_transfer.errors import UserError, listed, nearest
from hf_transfer.inference.attribution import Attribution
from hf_transfer.inference.explanations import Explanation, ImageExplanation, TextExplanation
from hf_transfer.inference.marked_words import Word, words_of
from hf_transfer.tasks.base import Task
from hf_transfer.tasks.text_classification import readable_part

_TRIED = 3  # made-up inputs by which the places in a model are found


class Explainer:
    """Explains the answers of a model.

    Args:
        task: what the model reads.
        model: with its head.
        processor: the tokenizer or image processor.
        labels: of the model.

    Raises:
        UserError: the model cannot be explained; the message says why.
    """

    def __init__(self, task: Task, model: Any, processor: Any, labels: Labels):
        self.task, self.model, self.processor, self.labels = task, model.eval(), processor, labels
        tried = self.task.encode(list(zip(*task.made_up(processor, _TRIED), strict=True)), processor)
        rows = [{name: values[i] for name, values in tried.items()} for i in range(_TRIED)]
        self.attribution = Attribution(model, labels.problem_type, self._batch(rows))

    def _batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        collated = self.task.collator(self.processor)(list(rows))
        return {name: value.to(self.model.device) for name, value in collated.items()}

    def explain(self, shown: Any, values: Sequence[Any], logits: Any, label: str | None = None) -> Explanation:
        """An explanation of one answer.

        Args:
            shown: the input, as in the answer.
            values: one per input column, as `Task.read` gave them.
            logits: (outputs,) of the answer.
            label: class to explain (default: the one with the highest probability).

        Raises:
            UserError: there is no such class.
        """
        chosen = int(np.asarray(logits).argmax()) if label is None else index_of(label, self.labels)
        scores = probabilities(np.asarray(logits, dtype=np.float64), self.labels.problem_type)
        is_value = self.labels.problem_type == REGRESSION
        about: dict[str, Any] = {
            "input": shown,
            "label": self.labels.names[chosen],
            "probability": None if is_value else float(scores[chosen]),
            "value": float(np.asarray(logits)[0]) if is_value else None,
            "method": self.attribution.method,
        }
        if self.attribution.is_text:
            return TextExplanation(**about, words=self._words(values, chosen))
        view, heatmap = self._heatmap(values, chosen)
        return ImageExplanation(**about, view=view, heatmap=heatmap)

    def _words(self, values: Sequence[str], chosen: int) -> tuple[tuple[Word, ...], ...]:
        texts = [readable_part(text, self.processor) for text in values]
        encoded = self.task.encode([[text] for text in texts], self.processor)
        batch = self._batch([{name: rows[0] for name, rows in encoded.items()}])
        ids = batch["input_ids"]
        special = self.processor.get_special_tokens_mask(ids[0].tolist(), already_has_special_tokens=True)
        is_word = ~torch.tensor(special, dtype=torch.bool, device=ids.device)[None]
        blank = {**batch, "input_ids": ids.masked_fill(is_word, _blank_token(self.processor))}
        found = self.attribution.of(batch, blank, chosen)
        return words_of(texts, encoded, found.values, self.processor)

    def _heatmap(self, values: Sequence[Any], chosen: int) -> tuple[Any, Any]:
        """((height, width, 3) pixels, (height, width) heatmap)."""
        encoded = self.task.encode([[value] for value in values], self.processor)
        batch = self._batch([{name: rows[0] for name, rows in encoded.items()}])
        pixels = batch["pixel_values"]
        blank = pixels.mean((-2, -1), keepdim=True).expand_as(pixels).contiguous()
        found = self.attribution.of(batch, {**batch, "pixel_values": blank}, chosen).values.clamp(min=0)
        size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        smooth = functional.interpolate(found[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        most = float(smooth.max())
        mean, std = statistics(self.processor)
        view = (pixels[0].float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        view = view.expand(3, *size) if len(view) == 1 else view
        return view.permute(1, 2, 0).numpy(), (smooth / most if most > 0 else smooth).numpy()


def index_of(label: str, labels: Labels) -> int:
    """The output of a class.

    Raises:
        UserError: the model has no such class, or predicts a number.
    """
    if labels.problem_type == REGRESSION:
        raise UserError("the model predicts a number, which has no classes.", "Leave it out.", key="explain_label")
    if label not in labels.names:
        known = nearest(label, labels.names) or f" The labels are {listed(labels.names)}."
        raise UserError(f"{label!r} is not a label of the model.{known}", key="explain_label")
    return labels.names.index(label)


def probabilities(logits: Any, problem_type: str) -> Any:
    """(outputs,) probabilities of one example."""
    return softmax(logits) if problem_type == SINGLE_LABEL else expit(logits)


def _blank_token(tokenizer: Any) -> int:
    """The token that stands for any word: the mask, or what the tokenizer has instead."""
    known = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, 0)
    return int(next(token for token in known if token is not None))
