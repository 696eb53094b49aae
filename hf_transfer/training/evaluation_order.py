"""Evaluation in the order of `data.length_windows`, with predictions and labels in the dataset's order.

What is overridden, and why that hook:

- `_get_eval_sampler`: the order in which examples are answered.
- `evaluation_loop`: gathers what was answered; metrics and callers get it in the dataset's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer

from hf_transfer.data.length_windows import order_of


class Ordered(torch.utils.data.Sampler[int]):
    """Examples in a given order.

    Args:
        order: (examples,) their positions.
    """

    def __init__(self, order: np.ndarray[Any, Any]):
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())


class InLengthOrder(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixin of a Trainer."""

    args: Any
    compute_metrics: Any

    @property
    def orders_evaluation(self) -> bool:
        """Whether evaluation may be in another order than the dataset's.

        Not where a metric sees batches, or inputs and losses, which are gathered too.
        """
        return not (self.args.batch_eval_metrics or self.args.include_for_metrics)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        order = order_of(eval_dataset, self.args.eval_batch_size) if self.orders_evaluation else None
        return super()._get_eval_sampler(eval_dataset) if order is None else Ordered(order)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        sampler = _sampler_of(dataloader)
        if not isinstance(sampler, Ordered):
            return super().evaluation_loop(dataloader, *args, **kwargs)
        places, own = np.argsort(sampler.order), self.compute_metrics

        def back(values: Any) -> Any:
            """(examples, …) arrays, or several of them, in the dataset's order."""
            if isinstance(values, tuple | list):
                return type(values)(back(one) for one in values)
            if isinstance(values, dict):
                return {name: back(one) for name, one in values.items()}
            return values[places] if values is not None and len(values) == len(places) else values

        if own is not None:
            self.compute_metrics = lambda p: own(EvalPrediction(back(p.predictions), back(p.label_ids)))
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = own
        return output._replace(predictions=back(output.predictions), label_ids=back(output.label_ids))


def _sampler_of(dataloader: Any) -> Any:
    """The sampler that a loader was made with, also after accelerate has divided its batches among processes."""
    batches: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)
