"""Streams whose beginning does not stand for the whole."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data import streaming
from hf_transfer.data.stream_order import check_order

NAMES = ClassLabel(names=["cat", "dog", "cow"])


def rows(values, feature=NAMES):
    return Dataset.from_dict({"label": values}, features=Features({"label": feature}))


@pytest.mark.parametrize(
    ("values", "feature", "is_whole", "said"),
    [
        ([0] * 200, NAMES, False, "sorted by class: its first 200 examples are all 'cat'"),
        (["x"] * 200, Value("string"), False, "are all 'x'"),
        ([0] * 150 + [1] * 50, NAMES, False, "in the order 'cat', 'dog'"),
        (
            [2] * 150 + [0] * 150,
            NAMES,
            True,
            "shuffle_buffer_size: the data is sorted .*Set shuffle_buffer_size to 300",
        ),
    ],
)
def test_sorted_data_is_refused(values, feature, is_whole, said):
    with pytest.raises(UserError, match=said):
        check_order(rows(values, feature), is_whole, DataArguments(shuffle_buffer_size=100))


@pytest.mark.parametrize(
    ("values", "feature", "is_whole"),
    [
        ([0, 1] * 100, NAMES, False),
        ([0] * 199 + [1, 0], NAMES, False),
        ([0] * 150 + [1] * 150, NAMES, True),  # the buffer holds a class
        ([0] * 200, NAMES, True),  # reported as a single class
        ([0] * 50, NAMES, False),
        ([i / 7 for i in range(200)], Value("float64"), False),
        (list(range(200)), Value("int64"), False),
    ],
)
def test_other_data_is_not(values, feature, is_whole):
    check_order(rows(values, feature), is_whole, DataArguments())


def test_the_beginning_of_a_stream_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "LOOK_TEXTS", 150)
    lines = [json.dumps({"text": f"text {i}", "label": "ab"[i // 200]}) for i in range(400)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    args = DataArguments(train_file=f"{tmp_path}/t.jsonl", streaming=True, max_eval_samples=10)
    with pytest.raises(UserError, match="its first 150 examples are all 'a'"):
        streaming.beginning(args)
