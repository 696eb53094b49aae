"""Data as files, and its labels."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.label_columns import label_column
from hf_transfer.data.labels import infer_labels
from hf_transfer.data.load import load_splits
from hf_transfer.data.splits import make_data

ROWS = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(20)]


def write(folder, form):
    folder.mkdir(exist_ok=True)
    data = Dataset.from_list(ROWS)
    if form == "csv":
        data.to_csv(folder / "train.csv")
    elif form == "tsv":
        data.to_csv(folder / "train.tsv", sep="\t")
    elif form == "jsonl":
        (folder / "train.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    elif form == "parquet":
        data.to_parquet(folder / "train.parquet")
    return folder / f"train.{form}"


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_files_and_folders(form, tmp_path):
    file = write(tmp_path / "d", form)
    for args in (
        DataArguments(dataset_name=str(file)),
        DataArguments(dataset_name=str(file.parent)),
        DataArguments(train_file=str(file), test_file=str(file)),
    ):
        splits = load_splits(args)
        assert splits["train"].to_list() == ROWS
    assert set(splits) == {"train", "test"}


def test_split_files_in_a_folder(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,0\nb,1\n")
    assert set(load_splits(DataArguments(dataset_name=str(tmp_path)))) == {"train", "validation", "test"}


def test_save_to_disk(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "a"))
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "b"))
    for name in "ab":
        assert load_splits(DataArguments(dataset_name=str(tmp_path / name)))["train"].to_list() == ROWS


def test_an_image_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (4, 4), i).save(tmp_path / "images" / name / f"{i}.png")
    splits = load_splits(DataArguments(dataset_name=str(tmp_path / "images")))
    assert splits["train"].features["label"].names == ["cat", "dog"] and len(splits["train"]) == 6


@pytest.mark.parametrize(
    ("feature", "values", "kind", "names"),
    [
        (ClassLabel(names=["n", "p"]), [0, 1, 1], "single_label_classification", ("n", "p")),
        (Value("string"), ["b", "a", "b"], "single_label_classification", ("a", "b")),
        (Value("int64"), [10, 2, 10], "single_label_classification", ("2", "10")),
        (Value("bool"), [True, False, True], "single_label_classification", ("False", "True")),
        (Value("float64"), [0.0, 1.0, 1.0], "single_label_classification", ("0", "1")),
        (Value("float64"), [0.5, 1.25, 3.0], "regression", ("label",)),
        ([Value("string")], [["x"], [], ["y", "x"]], "multi_label_classification", ("x", "y")),
    ],
)
def test_labels(feature, values, kind, names):
    data = Dataset.from_dict({"label": values}, features=Features({"label": feature}))
    labels = infer_labels(data, "label", None)
    assert (labels.problem_type, labels.names) == (kind, names)
    many = Dataset.from_dict(
        {"text": [str(i) for i in range(30)], "label": values * 10},
        features=Features({"text": Value("string"), "label": feature}),
    )
    made = make_data(DatasetDict({"train": many}), ("text",), "label", labels, DataArguments(), seed=0)
    expected = {
        "single_label_classification": lambda v: names.index(_name(data, v)),
        "regression": float,
        "multi_label_classification": lambda v: [float(n in v) for n in names],
    }[kind]
    rows = {
        **dict(zip(made.train["text"], made.train["labels"], strict=True)),
        **dict(zip(made.validation["text"], made.validation["labels"], strict=True)),
    }
    assert rows == {str(i): expected((values * 10)[i]) for i in range(30)}


def _name(data, value):
    feature = data.features["label"]
    if isinstance(feature, ClassLabel):
        return feature.int2str(value)
    return str(int(value)) if isinstance(value, float) else str(value)


def test_splits_are_drawn_by_class_and_by_seed():
    data = DatasetDict({"train": Dataset.from_list(ROWS * 10)})
    labels = infer_labels(data["train"], "label", None)
    args = DataArguments(train_val_split=0.2, max_train_samples=40)
    made, again, other = (make_data(data, ("text",), "label", labels, args, seed=s) for s in (0, 0, 1))
    assert len(made.train) == 40 and sum(made.train["labels"]) == 20 and sum(made.validation["labels"]) == 20
    assert made.train["text"] == again.train["text"] != other.train["text"]
    assert "No validation split: 40 of 200" in made.notes[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": "x"}] * 3, "has only one class"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "1 training examples have no label"),
    ],
)
def test_labels_that_cannot_be_learnt(rows, said):
    with pytest.raises(UserError, match=said):
        infer_labels(Dataset.from_list(rows), "label", None)


def test_a_label_that_training_has_not_seen():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list([{"text": "q", "label": "c"}])})
    with pytest.raises(UserError, match="1 examples with unknown label 'c'"):
        make_data(splits, ("text",), "label", infer_labels(splits["train"], "label", None), DataArguments(), 0)


def test_files_beside_a_named_data_set(tmp_path):
    file = write(tmp_path / "d", "csv")
    splits = load_splits(DataArguments(dataset_name="bundled:digits", validation_file=str(file)))
    assert set(splits) == {"train", "validation", "test"} and splits["validation"].to_list() == ROWS


def test_where_a_class_has_one_example_it_trains_and_that_is_said():
    rows = [{"text": str(i), "label": "rare" if i == 0 else "ab"[i % 2]} for i in range(20)]
    splits = DatasetDict({"train": Dataset.from_list(rows)})
    labels = infer_labels(splits["train"], "label", None)
    made = make_data(splits, ("text",), "label", labels, DataArguments(max_eval_samples=1), 0)
    assert (len(made.train), len(made.validation)) == (16, 1) and 0 in made.train["__row__"]
    assert "stays in training: rare." in made.notes[0]
    with pytest.raises(UserError, match="too few to hold some out"):
        make_data(DatasetDict({"train": Dataset.from_list(rows[:1])}), ("text",), "label", labels, DataArguments(), 0)


@pytest.mark.parametrize(
    ("values", "problem_type", "said"),
    [
        (["a", "b"], "regression", "expects numbers"),
        ([["a"], ["b"]], "single_label_classification", "expects one class per example"),
        (["ab", "b"], "multi_label_classification", "expects lists of classes"),
    ],
)
def test_labels_that_are_not_of_the_problem_type(values, problem_type, said):
    with pytest.raises(UserError, match=said):
        infer_labels(Dataset.from_dict({"label": values}), "label", problem_type)


def test_an_empty_folder_is_explained(tmp_path):
    with pytest.raises(UserError, match="unrecognized data in folder"):
        load_splits(DataArguments(dataset_name=str(tmp_path)))


def test_a_test_split_whose_labels_are_secret_is_left_out():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = {"text": [str(i) for i in range(20)], "label": [0, 1] * 10}
    secret = Dataset.from_dict({"text": ["q", "r"], "label": [-1, -1]}, features=features)
    splits = DatasetDict({"train": Dataset.from_dict(rows, features=features), "test": secret})
    labels = infer_labels(splits["train"], "label", None)
    made = make_data(splits, ("text",), "label", labels, DataArguments(), 0)
    assert made.test is None and "The test split has no labels" in made.notes[0]
    half = Dataset.from_dict({"text": ["q", "r"], "label": [-1, 1]}, features=features)
    with pytest.raises(UserError, match="1 examples of the test split have no label"):
        make_data(DatasetDict({**splits, "test": half}), ("text",), "label", labels, DataArguments(), 0)


def test_an_ambiguous_label_column_is_explained():
    with pytest.raises(UserError, match="Name one of a, b"):
        label_column({"text": 0, "a": 0, "b": 0}, ("text",), DataArguments())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"train_file": "none.csv"}, "train_file: file 'none.csv' does not exist"),
        ({"train_file": "none.docx"}, "unsupported file format: 'none.docx'.*Use one of .csv"),
        ({"dataset_name": "/none/at/all"}, "file or folder '/none/at/all' does not exist"),
    ],
)
def test_data_that_is_not_there(args, said):
    with pytest.raises(UserError, match=said):
        load_splits(DataArguments(**args))


def test_names_of_files_say_their_split(tmp_path):
    """However they are joined: a test file must never be trained on."""
    for name in ("train_data", "reviews-test", "my.valid.2"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,x\nb,y\n")
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 2,
        "test": 2,
        "validation": 2,
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["training.csv", "testing.csv"], {"train", "test"}),
        (["train2017.csv", "val2017.csv"], {"train", "validation"}),
        (["ReviewsTrain.csv", "ReviewsTestSet.csv"], {"train", "test"}),
        (["trainset.csv", "DEV.CSV"], {"train", "validation"}),
        (["latest.csv", "contest.csv"], {"train"}),
    ],
)
@pytest.mark.parametrize("pattern", ["", "/*.[cC]*"])
def test_the_words_for_splits_are_those_of_folders(pattern, names, expected, tmp_path):
    for name in names:
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    splits = load_splits(DataArguments(dataset_name=f"{tmp_path}{pattern}"))
    assert set(splits) == expected and sum(map(len, splits.values())) == 4


def test_a_pattern_over_the_folders_of_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "part-0.csv").write_text("text,label\na,x\nb,y\n")
    assert set(load_splits(DataArguments(dataset_name=f"{tmp_path}/**/*.csv"))) == {"train", "test"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train.csv", "dev.csv", "valid.csv"], "'dev.csv' and 'valid.csv' both mean the validation split"),
        (["train.csv", "trainval.csv"], "both mean the train split"),
        (["train_test.csv", "dev.csv"], r"'train_test.csv' contains several splits \(test, train\)"),
        (["train.csv", "all.csv"], "contain a split, but 'all.csv' does not"),
        (["train.csv", "train.tsv"], "'train.csv' and 'train.tsv' seem to be the same data in two formats"),
        (["a.csv", "a.csv.gz"], "'a.csv' and 'a.csv.gz' seem to be the same data in two formats"),
    ],
)
def test_file_names_that_can_be_read_in_two_ways(names, said, tmp_path):
    for name in names:
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    with pytest.raises(UserError, match=f"dataset_name: .*{said}"):
        load_splits(DataArguments(dataset_name=str(tmp_path)))


def test_what_else_is_in_a_folder_of_tables_is_named(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("train.csv", "test.xlsx", ".hidden.csv", "part/more.csv"):
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert splits.notes == [f"Not read in {tmp_path.name!r}: part/, test.xlsx."]


def test_paths_as_people_have_them(tmp_path, monkeypatch):
    """Brackets are no pattern, ~ is the home, a suffix may be in capitals."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("good[1].csv", "GOOD.CSV"):
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
        for place in (tmp_path / name, f"~/{name}"):
            assert len(load_splits(DataArguments(train_file=str(place)))["train"]) == 2
            assert len(load_splits(DataArguments(dataset_name=str(place)))["train"]) == 2


def test_a_table_of_metadata_belongs_to_the_images_beside_it(tmp_path):
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,x\nb.png,y\n")
    assert set(load_splits(DataArguments(dataset_name=str(tmp_path)))["train"].features) == {"image", "label"}
