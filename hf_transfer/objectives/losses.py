"""Losses that the model does not compute itself: class weights, focal loss, soft labels.

Each is a sum over examples and a weight to divide it by, so that the losses of micro-batches, on several processes,
add up to the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hf_transfer.data.labels import IGNORED
from hf_transfer.errors import UserError, nearest

_SINGLE, _MULTI, _REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@dataclass
class Loss:
    """A loss over logits of shape (examples, labels).

    Attributes:
        problem_type: as in `transformers` configurations.
        weights: (labels,), of each class or, for multi-label classification, of each label's positives; None for 1.
        gamma: focusing parameter of the focal loss (Lin et al. 2017, equation 4); 0 for cross-entropy.
        smoothing: label smoothing, the fraction spread over all classes (Szegedy et al. 2016, section 7).
        always: whether it replaces the model's own loss for all labels; if not, for soft labels only.
        knows_soft: whether labels may be soft (probabilities): the configuration says that the model is single-label.
    """

    problem_type: str
    weights: torch.Tensor | None = None
    gamma: float = 0.0
    smoothing: float = 0.0
    always: bool = False
    knows_soft: bool = True

    def applies(self, labels: torch.Tensor | None) -> bool:
        """Whether this loss takes the place of the model's own for these labels.

        Raises:
            UserError: the labels may be soft or multi-label, and the configuration does not say which.
        """
        return labels is not None and (self.always or self._is_soft(labels))

    def _is_soft(self, labels: torch.Tensor) -> bool:
        is_soft = self.problem_type == _SINGLE and labels.is_floating_point() and labels.ndim == 2
        if is_soft and self.always and not self.knows_soft:
            raise UserError(
                "The labels have a number for each class, and the model's configuration does not say what they mean.",
                f"Set `model.config.problem_type`: {_SINGLE} for soft labels, {_MULTI} for several labels.",
            )
        return is_soft and self.knows_soft

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """The divisor of `total` for these labels, a float64 scalar: Σ w·y, or the number of examples.

        For hard labels, total / weight is the mean of `torch.nn.functional.cross_entropy` with `weight`.

        Args:
            labels: (examples,) classes; (examples, labels) probabilities, 0 and 1, or values.
        """
        if self.problem_type != _SINGLE:
            return torch.tensor(float(len(labels)), dtype=torch.float64, device=labels.device)
        if self._is_soft(labels):
            soft = labels.double()
            return (soft if self.weights is None else soft * self.weights.to(soft)).sum()
        classes = labels[labels != IGNORED]
        if self.weights is None:
            return torch.tensor(float(len(classes)), dtype=torch.float64, device=labels.device)
        return self.weights.to(device=labels.device, dtype=torch.float64)[classes].sum()

    def total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over examples, a scalar in the logits' precision, at least fp32.

        Args:
            logits: (examples, labels).
            labels: as of `weight`.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights = None if self.weights is None else self.weights.to(logits)
        if self.problem_type == _REGRESSION:
            return (logits.reshape(labels.shape) - labels).square().sum() / max(1, labels[0].numel())
        if self.problem_type == _MULTI:
            return self._multi_label(logits, labels.to(logits), weights)
        if not self._is_soft(labels):
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
            labels = functional.one_hot(labels, logits.shape[-1])
        targets = labels.to(logits)
        targets = targets * (1 - self.smoothing) + self.smoothing / logits.shape[-1] * targets.sum(-1, keepdim=True)
        log_probabilities = functional.log_softmax(logits, dim=-1)
        if weights is not None:
            targets = targets * weights
        if self.gamma:
            targets = targets * (1 - log_probabilities.exp()).clamp(min=0) ** self.gamma
        return -(targets * log_probabilities).sum()

    def _multi_label(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Binary cross-entropy, averaged over labels and summed over examples."""
        targets = labels * (1 - self.smoothing) + self.smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        if self.gamma:
            correct = torch.where(labels > 0.5, logits.sigmoid(), 1 - logits.sigmoid())
            losses = losses * (1 - correct).clamp(min=0) ** self.gamma
        return losses.mean(-1).sum()


def make_loss(args: Any, config: Any, train_dataset: Any) -> Loss:
    """The loss that `LossArguments` and `label_smoothing_factor` ask for.

    Args:
        args: `TransferArguments`.
        config: of the model; None for a module without one.
        train_dataset: for `class_weights: auto`.

    Raises:
        UserError: class weights name an unknown class, or the labels cannot be counted.
    """
    configured = getattr(config, "problem_type", None)
    kind, weights = configured or _SINGLE, None
    if args.class_weights not in (None, "none") and train_dataset is not None:
        weights = _weights(args.class_weights, kind, config, train_dataset)
    smoothing = args.label_smoothing_factor
    if smoothing and kind == _REGRESSION:
        raise UserError("label_smoothing_factor: regression targets cannot be smoothed.", "Leave it out.")
    always = weights is not None or args.focal_gamma > 0 or (smoothing > 0 and kind == _MULTI)
    return Loss(kind, weights, args.focal_gamma, smoothing, always, knows_soft=configured == _SINGLE)


def _weights(wanted: str | Mapping[str, float], kind: str, config: Any, train_dataset: Any) -> torch.Tensor:
    if getattr(config, "id2label", None) is None:
        raise UserError("class_weights: the model's configuration has no class names (`id2label`).", "Leave it out.")
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    if kind == _REGRESSION:
        raise UserError("class_weights: regression has no classes.", "Leave class_weights out.")
    if isinstance(wanted, Mapping):
        for name in wanted:
            if str(name) not in names:
                raise UserError(
                    f"class_weights: unknown class {str(name)!r}.",
                    f"The classes are {', '.join(names[:10])}.{nearest(str(name), names)}",
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

    Args:
        dataset: a `datasets.Dataset` with a column `labels`.
        key: that needs them, for the message.

    Raises:
        UserError: the dataset has no column `labels`.
    """
    if "labels" not in (getattr(dataset, "column_names", None) or ()):
        raise UserError(f"{key} needs a training set with a column `labels`.", "Use a datasets.Dataset.")
    return dataset.with_format(None).select_columns(["labels"])["labels"][:]


class BalancedSampler(torch.utils.data.Sampler[int]):
    """Draw as many examples as there are, with replacement, each class equally often in expectation.

    The order is a function of seed and epoch.

    Args:
        labels: class of each example.
        seed: of the draws.
    """

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
