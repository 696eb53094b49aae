"""Knowledge distillation: the distance of a model's logits or features from a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.features.layouts import token_of
from hf_transfer.objectives.objective import ASIDE, Batch, Penalty

NAME = "distillation_alpha"


def logit_distillation(
    alpha: float, temperature: float, teacher: nn.Module, problem_type: str, order: Sequence[int] = ()
) -> Penalty:
    """alpha T² KL(teacher ‖ model), with both softmaxes at temperature T (Hinton et al. 2015, section 2).

    The mean over examples; with several labels, of the binary divergences, averaged over labels; for a regression, of
    the squared difference of the predictions.

    Args:
        alpha: weight of the term, next to the loss with weight 1.
        temperature: T.
        teacher: frozen here; computed in eval mode and without gradient.
        problem_type: as in `transformers` configurations.
        order: of the teacher's outputs, as the model's are ordered; empty where it is the same.
    """

    def distance(module: nn.Module | None, model: nn.Module, batch: Batch, outputs: Any) -> torch.Tensor:
        assert module is not None
        wanted, own = _wide(_logits(_answer(module, batch))), _wide(_logits(outputs))
        wanted = wanted[..., list(order)] if order else wanted
        if problem_type == REGRESSION:
            return (own - wanted).square().mean()
        wanted, own = wanted / temperature, own / temperature
        if problem_type == MULTI_LABEL:
            aim = wanted.sigmoid()
            least = functional.binary_cross_entropy_with_logits(wanted, aim)
            return temperature**2 * (functional.binary_cross_entropy_with_logits(own, aim) - least)
        log_own, log_wanted = functional.log_softmax(own, -1), functional.log_softmax(wanted, -1)
        return temperature**2 * functional.kl_div(log_own, log_wanted, reduction="batchmean", log_target=True)

    return Penalty(NAME, lambda step: alpha, teacher.eval().requires_grad_(False), distance)


class Reader:
    """What a layer reads: the vectors of the newest forward pass within its context.

    Args:
        layer: called once per forward pass.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self._input: torch.Tensor | None = None

    def __enter__(self) -> Reader:
        self._handle = self.layer.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0]

    def take(self, batch: Batch) -> torch.Tensor:
        """(examples, width), of the last token that is not padding where the layer reads all of them; once."""
        vectors, self._input = self._input, None
        assert vectors is not None, "a forward pass came before"
        if vectors.ndim == 3:
            vectors = token_of(vectors, "last", batch.get("attention_mask"))
        return _wide(vectors.flatten(1))


def feature_distillation(alpha: float, teacher: nn.Module, of_teacher: Reader, of_model: Reader) -> Penalty:
    """alpha times the mean squared difference of what both heads read (Romero et al. 2015, equation 3).

    Args:
        alpha: weight of the term, next to the loss with weight 1.
        teacher: frozen here; computed in eval mode and without gradient.
        of_teacher: what its head reads.
        of_model: what the trained model's head reads.
    """

    def distance(module: nn.Module | None, model: nn.Module, batch: Batch, outputs: Any) -> torch.Tensor:
        assert module is not None
        with of_teacher:
            _answer(module, batch)
        return (of_model.take(batch) - of_teacher.take(batch)).square().mean()

    frozen = teacher.eval().requires_grad_(False)
    return Penalty(NAME, lambda step: alpha, frozen, distance, watch=lambda model, batch: of_model)


def _answer(teacher: nn.Module, batch: Batch) -> Any:
    device = next(teacher.parameters()).device
    accepted = signature(teacher.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    wanted = {k: v for k, v in batch.items() if k not in ASIDE and (takes_all or k in accepted)}
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in wanted.items()}
    teacher.train(False)
    with torch.no_grad():
        return teacher(**inputs)


def _logits(outputs: Any) -> torch.Tensor:
    logits: torch.Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
