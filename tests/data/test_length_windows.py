"""The order of texts within windows of 50 batches."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from hf_transfer.data.length_windows import WINDOW, order_of, window_order


def test_a_window_is_sorted_alone_the_longest_first():
    lengths = np.random.default_rng(0).integers(1, 9, 2 * WINDOW * 3 + 7)
    order, size = window_order(lengths, 3), WINDOW * 3
    assert sorted(order) == list(range(len(lengths)))
    for start in range(0, len(lengths), size):
        own = order[start : start + size]
        assert sorted(own) == list(range(start, min(start + size, len(lengths))))
        assert own.tolist() == sorted(own, key=lambda i: (-lengths[i], i))
        assert (own == start + window_order(lengths[start : start + size], 3)).all()  # as a stream sees it


def test_where_there_is_nothing_to_sort():
    texts = Dataset.from_dict({"input_ids": [[1], [1, 2], [1, 2, 3]], "labels": [0, 1, 0]})
    assert order_of(texts, 2).tolist() == [2, 1, 0]
    assert order_of(texts.select([2, 1, 0]), 2) is None and order_of(texts.select([]), 2) is None
    assert order_of(texts.select_columns(["labels"]), 2) is None
    assert order_of(texts.with_transform(lambda batch: batch), 2) is None
    assert order_of([{"input_ids": [1]}, {"input_ids": [1, 2]}], 2) is None
    assert order_of(Dataset.from_dict({"input_ids": [1, 2]}), 2) is None
