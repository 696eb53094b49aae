"""Labels in every form that people have them in."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.label_columns import find_labels
from hf_transfer.data.labels import encode, infer_labels
from hf_transfer.data.splits import make_data

TEXTS = [f"t{i}" for i in range(6)]
# The same labels in the three forms; the last example has none.
NAMES = [["red"], ["round", "red"], ["round"], ["red"], ["round"], []]
FORMS = {
    "lists": ({"label": NAMES}, {}),
    "columns": (
        {"red": [1, 1, 0, 1, 0, 0], "round": [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]},
        {"label_column_name": ["red", "round"]},
    ),
    "booleans": (
        {"red": [True, True, False, True, False, False], "round": [False, True, True, False, True, False]},
        {"label_column_name": ["red", "round"]},
    ),
    "delimiter": ({"label": ["red", "round| red", "round", "red", "round|", ""]}, {"label_delimiter": "|"}),
    "nothing": ({"label": ["red", "round;red", "round", "red", "round", None]}, {"label_delimiter": ";"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_several_labels_in_three_forms(form):
    columns, keys = FORMS[form]
    splits = DatasetDict({"train": Dataset.from_dict({"text": TEXTS, **columns})})
    found = find_labels(splits, ("text",), DataArguments(**keys))
    splits, column = found.splits, found.name
    labels = infer_labels(splits["train"], column, None)
    assert labels.problem_type == "multi_label_classification" and labels.names == ("red", "round")
    encoded = encode(splits["train"], "train", column, labels)
    assert encoded["labels"][:] == [[float("red" in n), float("round" in n)] for n in NAMES]


def test_a_label_column_per_class_keeps_their_order_and_the_ones_that_never_occur():
    data = DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"], "z": [1, 0], "y": [0, 0], "x": [1, 1]})})
    args = DataArguments(label_column_name=["z", "y", "x"])
    found = find_labels(data, ("text",), args)
    assert infer_labels(found.splits["train"], found.name, None).names == ("z", "y", "x")


@pytest.mark.parametrize(
    ("columns", "keys", "said"),
    [
        ({"a": [0, 2], "b": [1, 0]}, {"label_column_name": ["a", "b"]}, "column 'a' of the train split contains 2"),
        ({"a": ["x", "y"], "b": [1, 0]}, {"label_column_name": ["a", "b"]}, "contains 'x', expected 0 or 1"),
        ({"a": [0, 1]}, {"label_column_name": ["a", "bb"]}, "column 'bb' does not exist"),
        ({"a": [0, 1]}, {"label_column_name": ["a", "text"]}, "'text' is an input column"),
        ({"label": [[1], [2]]}, {"label_delimiter": ","}, "contains lists, not text to split"),
        ({"a": [0, 1], "b": [0, 1]}, {}, "or several columns of 0 and 1"),
    ],
)
def test_columns_that_hold_something_else(columns, keys, said):
    data = DatasetDict({"train": Dataset.from_dict({"text": ["p", "q"], **columns})})
    with pytest.raises(UserError, match=said):
        find_labels(data, ("text",), DataArguments(**keys))


def splits(train, test):
    make = lambda names: Dataset.from_dict({"text": [f"{n}{i}" for i, n in enumerate(names)], "label": names})  # noqa: E731
    return DatasetDict({"train": make(train), "test": make(test)})


def test_labels_that_differ_between_splits_are_told_with_the_difference():
    data = splits(list("aabbaabb"), list("abcddd"))
    labels = infer_labels(data["train"], "label", None)
    with pytest.raises(UserError, match=r"test split has 4 examples with unknown labels 'c', 'd'"):
        make_data(data, ("text",), "label", labels, DataArguments(), 0)
    made = make_data(data, ("text",), "label", labels, DataArguments(on_bad_example="skip"), 0)
    assert made.test["text"][:] == ["a0", "b1"]
    assert [(b.split, b.example, b.reason) for b in made.skipped] == [
        ("test", "row 2", "unknown label 'c'"),
        *(("test", f"row {i}", "unknown label 'd'") for i in (3, 4, 5)),
    ]


def test_a_class_that_is_declared_but_never_trained():
    """As in an image folder whose test folder has a class more: the feature lists it for both."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    train = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 3}, features=features)
    test = Dataset.from_dict({"text": ["x", "y"], "label": [2, 0]}, features=features)
    data = DatasetDict({"train": train, "validation": train, "test": test})
    labels = infer_labels(train, "label", None)
    assert labels.names == ("a", "b", "c"), "class names are kept"
    with pytest.raises(UserError, match="test split has examples of class 'c', but the training split has none"):
        make_data(data, ("text",), "label", labels, DataArguments(), 0)
    made = make_data(data, ("text",), "label", labels, DataArguments(on_bad_example="skip"), 0)
    assert made.test["text"][:] == ["y"] and len(made.skipped) == 1


def test_missing_labels_are_refused_or_skipped():
    data = DatasetDict({"train": Dataset.from_dict({"text": TEXTS, "label": ["a", None, "b", "a", "b", "a"]})})
    with pytest.raises(UserError, match="1 training examples have no label"):
        infer_labels(data["train"], "label", None)
    labels = infer_labels(data["train"], "label", None, skip_missing=True)
    assert labels.names == ("a", "b")
    made = make_data(data, ("text",), "label", labels, DataArguments(on_bad_example="skip"), 0)
    assert sorted([*made.train["text"], *made.validation["text"]]) == ["t0", "t2", "t3", "t4", "t5"]
    assert [(b.example, b.reason) for b in made.skipped] == [("row 1", "missing label")]
