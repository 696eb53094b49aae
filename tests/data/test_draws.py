"""Samples that keep every class, and splits that divide no group."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.draws import class_counts, draw
from hf_transfer.data.examine import examine
from hf_transfer.data.groups import groups_of, shared_groups
from hf_transfer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Labels
from hf_transfer.data.splits import make_data
from hf_transfer.tasks import TASKS


def split_of(classes, **columns) -> tuple[Dataset, Labels]:
    names = sorted(set(classes))
    labels = [names.index(c) for c in classes]
    rows = {"text": [f"text {i}" for i in range(len(labels))], "labels": labels, **columns}
    return Dataset.from_dict(rows), Labels(SINGLE_LABEL, tuple(map(str, names)))


def made(classes, args: DataArguments, seed: int = 0, **columns):
    rows = {"text": [f"text {i}" for i in range(len(classes))], "label": classes, **columns}
    labels = Labels(SINGLE_LABEL, tuple(sorted(set(classes))))
    return make_data(DatasetDict({"train": Dataset.from_dict(rows)}), ("text",), "label", labels, args, seed)


@pytest.mark.parametrize("fraction", [0.1, 0.9])
@pytest.mark.parametrize(
    "classes",
    [
        ["a"] * 30 + ["b"] * 29 + [f"rare{i}" for i in range(10)],
        ["a"] * 40 + ["b"] * 2 + ["c"] * 2,
        [f"c{i // 2}" for i in range(40)],
    ],
)
def test_no_class_leaves_training(classes, fraction):
    for seed in range(2):
        data = made(classes, DataArguments(train_val_split=fraction), seed)
        assert set(data.train["labels"]) == set(range(len(set(classes))))
        assert sorted([*data.train["text"], *data.validation["text"]]) == sorted(
            f"text {i}" for i in range(len(classes))
        )
        wanted = int(np.ceil(len(classes) * fraction))
        assert len(data.validation) == min(wanted, len(classes) - len(set(classes)))


def test_the_rest_is_held_out_in_proportion_and_single_examples_are_named():
    data = made(["a"] * 60 + ["b"] * 30 + ["z1", "z2"], DataArguments(train_val_split=0.1))
    assert Counter(data.validation["labels"]) == {0: 7, 1: 3}
    assert "10 of 92" in data.notes[0] and "stratified" in data.notes[0]
    assert "a single example, which stays in training: z1, z2." in data.notes[0]


def test_what_can_be_stratified_is_drawn_as_datasets_draws_it():
    split, labels = split_of(["a", "b"] * 50)
    features = split.features.copy()
    features["labels"] = ClassLabel(names=["a", "b"])
    parts = split.cast(features).train_test_split(test_size=10, seed=3, stratify_by_column="labels")
    drawn = draw(split, 10, labels, 3, keep="rest")
    assert drawn.sample["text"][:] == parts["test"]["text"][:] and drawn.rest["text"][:] == parts["train"]["text"][:]


def test_where_every_class_has_one_example_nothing_can_be_held_out():
    with pytest.raises(UserError, match=r"No class of the training split has two examples \(12 examples\)"):
        made([f"c{i:02}" for i in range(12)], DataArguments())


def test_a_limit_keeps_every_class():
    classes = ["a"] * 500 + [f"rare{i}" for i in range(8)] * 2
    for limit in (9, 100):
        data = made(classes, DataArguments(max_train_samples=limit))
        assert len(data.train) == limit and len(set(data.train["labels"])) == 9
    assert len(made(classes, DataArguments(max_train_samples=8)).train) == 8, "where it cannot, it is in proportion"


def multi_label(rows, seed=0):
    encoded = [[1.0 if i in row else 0.0 for i in range(6)] for row in rows]
    split = Dataset.from_dict({"text": [str(i) for i in range(len(rows))], "labels": encoded})
    return split, Labels(MULTI_LABEL, tuple("abcdef"))


def test_several_labels_per_example_keep_every_label():
    rng = np.random.default_rng(0)
    rows = [set(rng.choice(3, 2)) for _ in range(60)] + [{3}, {3, 4}, {0, 5}]  # 4 and 5 occur once
    split, labels = multi_label(rows)
    for seed in range(2):
        drawn = draw(split, 30, labels, seed, keep="rest")
        assert (class_counts(drawn.rest, labels) > 0).all() and len(drawn.sample) == 30
        assert len(drawn.rest) == 33 and not set(drawn.rest["text"]) & set(drawn.sample["text"])
        few = draw(split, 4, labels, seed, keep="sample")
        assert (class_counts(few.sample, labels) > 0).all() and len(few.sample) == 4


def test_a_class_whose_other_examples_are_unusable_gets_its_held_out_one_back():
    """Of two examples one is held out, and the other turns out to be blank."""
    classes = ["a", "b"] * 20 + ["rare", "rare"]
    args = DataArguments(on_bad_example="skip", max_bad_fraction=0.5, train_val_split=0.5)
    returned: list[bool] = []
    for blank in (40, 41):
        rows = {"text": [" " if i == blank else f"text {i}" for i in range(42)], "label": classes}
        labels = Labels(SINGLE_LABEL, ("a", "b", "rare"))
        data = make_data(DatasetDict({"train": Dataset.from_dict(rows)}), ("text",), "label", labels, args, 0)
        data, facts = examine(data, TASKS["text-classification"].trace, args, 0)
        assert 2 in data.train["labels"] and facts.splits["train"].classes["rare"] == 1
        assert (len(data.train), len(data.validation)) == (21, 20)
        returned += ["train after all: no other usable example of rare" in note for note in data.notes]
    assert sum(returned) == 1, "the draw left the blank one to training in one of the two cases"
    users = [str(i // 2) for i in range(40)] + ["40", "41"]
    args = replace(args, split_group_column_name="user")
    data = make_data(
        DatasetDict({"train": Dataset.from_dict({**rows, "user": users})}), ("text",), "label", labels, args, 0
    )
    data, _ = examine(data, TASKS["text-classification"].trace, args, 0)
    assert 2 in data.train["labels"] and not set(data.train["user"]) & set(data.validation["user"])


# ---- groups --------------------------------------------------------------------------------------------------------


def grouped(sizes, seed=0):
    """(classes, groups): patients with the given numbers of images, each patient mostly of one class."""
    rng = np.random.default_rng(seed)
    groups = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    classes = [("a" if int(g[1:]) % 3 else "b") if rng.random() < 0.8 else "c" for g in groups]
    order = rng.permutation(len(groups))
    return [classes[i] for i in order], [groups[i] for i in order]


@pytest.mark.parametrize("sizes", [[5] * 60, list(range(1, 40)), [1] * 200, [80, 60, *[4] * 30], [30, 30, 30, 30]])
def test_no_group_lies_on_both_sides(sizes):
    classes, groups = grouped(sizes)
    args = DataArguments(split_group_column_name="patient", train_val_split=0.2)
    data = made(classes, args, patient=groups)
    held, rest = set(data.validation["patient"]), set(data.train["patient"])
    assert held and not held & rest and held | rest == set(groups)
    assert set(data.train["labels"]) == {0, 1, 2}
    wanted = 0.2 * len(classes)
    assert abs(len(data.validation) - wanted) <= max(3, min(sizes) / 2)
    if len(sizes) > 30:
        shares = np.bincount(data.validation["labels"], minlength=3) / np.unique(classes, return_counts=True)[1]
        assert np.abs(shares - 0.2).max() < 0.07, "stratified as far as groups allow"
    assert f"all examples of {len(held)} of {len(sizes)} values of 'patient'" in data.notes[0]
    assert made(classes, args, patient=groups).validation["text"][:] == data.validation["text"][:]
    assert (
        len(sizes) < 5
        or made(classes, args, seed=1, patient=groups).validation["text"][:] != data.validation["text"][:]
    )


def test_groups_of_regression_and_of_several_labels():
    numbers = [i // 4 for i in range(40)]
    rows = {"text": [str(i) for i in range(40)], "label": [i / 7 for i in range(40)], "user": numbers}
    args = DataArguments(split_group_column_name="user", train_val_split=0.1)
    data = make_data(
        DatasetDict({"train": Dataset.from_dict(rows)}), ("text",), "label", Labels(REGRESSION, ("label",)), args, 0
    )
    assert len(set(data.validation["user"])) == 1 and len(data.validation) == 4
    rows["label"] = [["x", "y"][: 1 + i % 2] for i in range(40)]
    data = make_data(
        DatasetDict({"train": Dataset.from_dict(rows)}), ("text",), "label", Labels(MULTI_LABEL, ("x", "y")), args, 0
    )
    assert len(set(data.validation["user"])) == 1 and len(data.validation) == 4


@pytest.mark.parametrize(
    ("patient", "said"),
    [
        (["p"] * 12, "all training examples have the same value in column 'patient'"),
        ([*"abcdefghijk", None], "1 training examples have no value in column 'patient' \\(first: row 11\\)"),
        ([*"abcdefghijk", " "], "1 training examples have no value"),
        (["x", "y"] * 6, "each holds the only examples of a class"),
        ([[1]] * 12, "contains list values"),
    ],
)
def test_groups_that_cannot_be_held_out(patient, said):
    args = DataArguments(split_group_column_name="patient")
    with pytest.raises(UserError, match=f"split_group_column_name: .*{said}"):
        made(["a", "b"] * 6, args, patient=patient)


def test_columns_that_cannot_be_groups():
    with pytest.raises(UserError, match=r"column 'patien' does not exist. .*Did you mean 'patient'"):
        made(["a", "b"] * 6, DataArguments(split_group_column_name="patien"), patient=[*"abcdefghijkl"])
    with pytest.raises(UserError, match="'label' is the label column"):
        made(["a", "b"] * 6, DataArguments(split_group_column_name="label"))


def test_examples_without_a_group_are_skipped_and_named():
    args = DataArguments(split_group_column_name="patient", on_bad_example="skip")
    data = made(["a", "b"] * 10, args, patient=[*[str(i // 2) for i in range(19)], None])
    assert [(b.example, b.reason) for b in data.skipped] == [("row 19", "no value in the group column")]
    assert "text 19" not in {*data.train["text"], *data.validation["text"]}


def test_groups_that_the_data_itself_divides_are_reported():
    train = Dataset.from_dict({"user": [1, 2, 2, 3]})
    test = Dataset.from_dict({"user": ["2", "2", " 3 ", "4", None]})
    (leak,) = shared_groups({"train": train, "test": test}, "user")
    assert (leak.kept, leak.other, leak.groups, leak.examples, leak.shown) == ("test", "train", 2, 3, ("2", "3"))
    assert shared_groups({"train": train, "test": Dataset.from_dict({"text": ["a"]})}, "user") == []


def test_groups_are_compared_as_text():
    numbers = Dataset.from_dict({"g": [7.0, None, float("nan"), 1.5]})
    assert groups_of(numbers, "g") == ["7", None, None, "1.5"]
    classes = Dataset.from_dict({"g": [0, 1, None]}, features=Features({"g": ClassLabel(names=["p", "q"])}))
    assert groups_of(classes, "g") == ["p", "q", None]
    assert groups_of(Dataset.from_dict({"g": ["a"]}, features=Features({"g": Value("string")})), "g") == ["a"]


@pytest.mark.parametrize(("examples", "held"), [(100, 20), (499, 100), (500, 50)])
def test_of_fewer_than_500_a_fifth_is_held_out(examples, held):
    assert len(made(["a", "b"] * (examples // 2) + ["a"] * (examples % 2), DataArguments()).validation) == held
