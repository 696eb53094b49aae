"""Losses beside the model's own: class weights, focal loss, soft labels; exact under accumulation, on processes.

Each is a sum over examples and a weight to divide it by, so that parts of a batch add up to the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hf_transfer.config.arguments.loss import LossArguments
from hf_transfer.errors import UserError, nearest

IGNORED = -100
_SINGLE, _MULTI, _REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def check(args: LossArguments) -> list[str]:
    """Problems of the keys, a sentence each."""
    found = []
    weights = args.class_weights
    if isinstance(weights, str) and weights not in ("none", "auto"):
        found.append(f"class_weights: {weights!r} is not none, auto or a mapping.{nearest(weights, ('none', 'auto'))}")
    if isinstance(weights, Mapping):
        found += [
            f"class_weights: {name}: {w!r} is not a number of 0 or more."
            for name, w in weights.items()
            if isinstance(w, bool) or not isinstance(w, int | float) or not 0 <= w < float("inf")
        ]
    return found


@dataclass
class Loss:
    """A loss over logits (examples, labels).

    Attributes:
        problem_type: as in `transformers` configurations.
        weights: (labels,), per class, or for several labels of the positives; None for 1 each.
        gamma: of the focal loss (Lin et al. 2017, equation 4).
        smoothing: share of a label that is spread over all classes (Szegedy et al. 2016, section 7).
        always: also where the model's own loss would do.
        knows_soft: whether labels of shares are expected: the model is said to have one class of several.
    """

    problem_type: str
    weights: torch.Tensor | None = None
    gamma: float = 0.0
    smoothing: float = 0.0
    always: bool = False
    knows_soft: bool = True

    def applies(self, labels: torch.Tensor | None) -> bool:
        """Whether this loss takes the place of the model's own."""
        return labels is not None and (self.always or self._is_soft(labels))

    def _is_soft(self, labels: torch.Tensor) -> bool:
        is_shares = self.problem_type == _SINGLE and labels.is_floating_point() and labels.ndim == 2
        if is_shares and self.always and not self.knows_soft:
            raise UserError(
                "The labels are a number for each class, and the model's configuration does not say what they mean.",
                f"Set `model.config.problem_type`: {_SINGLE} for shares of one label, {_MULTI} for several labels.",
            )
        return is_shares and self.knows_soft

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """What to divide the sum over these examples by, a scalar: Σ w·y, or the number of examples.

        For hard labels that is the mean of `torch.nn.functional.cross_entropy` with `weight`.
        """
        if self.problem_type != _SINGLE:
            return torch.tensor(float(len(labels)), dtype=torch.float64, device=labels.device)
        if self._is_soft(labels):
            shares = labels.double()
            return (shares if self.weights is None else shares * self.weights.to(shares)).sum()
        known = labels[labels != IGNORED]
        if self.weights is None:
            return torch.tensor(float(len(known)), dtype=torch.float64, device=labels.device)
        return self.weights.to(device=labels.device, dtype=torch.float64)[known].sum()

    def total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over examples, a scalar in the logits' precision, fp32 at least."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights = None if self.weights is None else self.weights.to(logits)
        if self.problem_type == _REGRESSION:
            return (logits.reshape(labels.shape) - labels).square().sum() / max(1, labels[0].numel())
        if self.problem_type == _MULTI:
            return self._of_several(logits, labels.to(logits), weights)
        if not self._is_soft(labels):
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
            labels = functional.one_hot(labels, logits.shape[-1])
        shares = labels.to(logits)
        shares = shares * (1 - self.smoothing) + self.smoothing / logits.shape[-1] * shares.sum(-1, keepdim=True)
        logs = functional.log_softmax(logits, dim=-1)
        if weights is not None:
            shares = shares * weights
        if self.gamma:
            shares = shares * (1 - logs.exp()).clamp(min=0) ** self.gamma
        return -(shares * logs).sum()

    def _of_several(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Binary cross-entropy, its mean over labels, summed over examples."""
        smooth = labels * (1 - self.smoothing) + self.smoothing / 2
        each = functional.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights, reduction="none")
        if self.gamma:
            right = torch.where(labels > 0.5, logits.sigmoid(), 1 - logits.sigmoid())
            each = each * (1 - right).clamp(min=0) ** self.gamma
        return each.mean(-1).sum()


def make_loss(args: Any, config: Any, train_dataset: Any) -> Loss:
    """The loss that `LossArguments` and `label_smoothing_factor` ask for.

    Raises:
        UserError: weights name no class, or there is nothing to count.
    """
    said = getattr(config, "problem_type", None)  # any module may be trained, also one that has no configuration
    kind, weights = said or _SINGLE, None
    if args.class_weights not in (None, "none") and train_dataset is not None:
        weights = _weights(args.class_weights, kind, config, train_dataset)
    smoothing = args.label_smoothing_factor
    if smoothing and kind == _REGRESSION:
        raise UserError("label_smoothing_factor: a regression has no labels to smooth.", "Leave it out.")
    always = weights is not None or args.focal_gamma > 0 or (smoothing > 0 and kind == _MULTI)
    return Loss(kind, weights, args.focal_gamma, smoothing, always, knows_soft=said == _SINGLE)


def _weights(wanted: str | Mapping[str, float], kind: str, config: Any, train_dataset: Any) -> torch.Tensor:
    if getattr(config, "id2label", None) is None:
        raise UserError("class_weights: the model's configuration names no classes (`id2label`).", "Leave it out.")
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    if kind == _REGRESSION:
        raise UserError("class_weights: a regression has no classes.", "Leave class_weights out.")
    if isinstance(wanted, Mapping):
        for name in wanted:
            if str(name) not in names:
                raise UserError(
                    f"class_weights: there is no class {str(name)!r}.",
                    f"There are {', '.join(names[:10])}.{nearest(str(name), names)}",
                )
        given = {str(k): float(v) for k, v in wanted.items()}
        return torch.tensor([given.get(name, 1.0) for name in names], dtype=torch.float64)
    labels = np.asarray(labels_of(train_dataset, "class_weights: auto"))
    if kind == _MULTI:
        positives = labels.sum(0)
        return torch.tensor((len(labels) - positives) / np.maximum(positives, 1), dtype=torch.float64)
    counts = np.bincount(labels, minlength=len(names))
    present = (counts > 0).sum()
    return torch.tensor(np.where(counts > 0, len(labels) / (present * np.maximum(counts, 1)), 1.0), dtype=torch.float64)


def labels_of(dataset: Any, key: str) -> Sequence[Any]:
    """The labels of a training set, without reading its inputs.

    Raises:
        UserError: they cannot be counted.
    """
    if "labels" not in (getattr(dataset, "column_names", None) or ()):
        raise UserError(f"{key} needs a training set with a column `labels`.", "Give a datasets.Dataset.")
    return dataset.with_format(None).select_columns(["labels"])["labels"][:]


class BalancedSampler(torch.utils.data.Sampler[int]):
    """As many draws as there are examples, with replacement, each class as often; the same for the same epoch."""

    def __init__(self, labels: Sequence[int], seed: int):
        counts = np.bincount(labels)
        self.weights = torch.tensor(1 / counts[np.asarray(labels)], dtype=torch.float64)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist())
