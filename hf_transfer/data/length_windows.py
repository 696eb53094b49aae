"""The order in which texts are answered: within windows of 50 batches, the longest first, which saves padding.

Training's evaluation, `evaluate` and `predict` all take it from here, so that the same texts share a batch in each and
their logits are the same bit for bit. A window is a whole number of batches: what a batch holds depends on the texts of
its window alone, and answers can be given window by window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.types

from hf_transfer.data.bucketing import list_lengths

WINDOW = 50  # batches
TOKENS = "input_ids"  # the model input whose length varies

Array = np.ndarray[Any, Any]


def window_order(lengths: Sequence[int] | Array, batch_size: int) -> Array:
    """Positions of the examples in the order in which they are answered, (examples,); a stable sort of each window.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples per forward pass.
    """
    values = np.asarray(lengths)
    windows = np.arange(len(values)) // (WINDOW * batch_size)
    return np.lexsort((-values, windows))


def order_of(dataset: Any, batch_size: int) -> Array | None:
    """`window_order` of a prepared dataset; None where the order saves nothing or lengths would have to be computed.

    Args:
        dataset: as the model takes it.
        batch_size: examples per forward pass.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return None
    if TOKENS not in dataset.column_names or not len(dataset):
        return None
    if not pyarrow.types.is_nested(dataset.data.schema.field(TOKENS).type):
        return None
    order = window_order(list_lengths(dataset, TOKENS), batch_size)
    return None if (order == np.arange(len(order))).all() else order
