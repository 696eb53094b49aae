"""`train_file`, `validation_file` and `test_file` as folders: of tables, and of images."""

from __future__ import annotations

import pytest
from PIL import Image

from hf_transfer import UserError
from hf_transfer.cli.evaluate import _take_data
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.load import load_held_out, load_splits
from hf_transfer.data.streaming import open_streams


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, classes in (("photos/train", "cat dog"), ("photos/val", "dog"), ("other", "dog fox")):
        for name in classes.split():
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / folder / name / f"{i}.png")
    for folder in ("one", "two", "mixed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "one" / "a.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "one" / "b.csv").write_text("text,label\nc,x\n")
    (tmp_path / "two" / "test.csv").write_text("text,label\nd,y\n")
    (tmp_path / "mixed" / "train.csv").write_text("text,label\nd,y\n")
    (tmp_path / "mixed" / "test.csv").write_text("text,label\nd,y\n")
    return tmp_path


def test_folders_of_tables(world):
    splits = load_splits(DataArguments(train_file="one", test_file="two"))
    assert {name: split["text"][:] for name, split in splits.items()} == {"train": ["a", "b", "c"], "test": ["d"]}


def test_image_folders_with_their_classes_as_names(world):
    splits = load_splits(DataArguments(train_file="photos/train", validation_file="photos/val", test_file="other"))
    assert {name: split["label"][:] for name, split in splits.items()} == {
        "train": ["cat", "cat", "dog", "dog"],
        "validation": ["dog", "dog"],
        "test": ["dog", "dog", "fox", "fox"],
    }
    assert any(note.startswith("validation: 2 files found, 2 read") for note in splits.notes)
    name, held_out = load_held_out(DataArguments(test_file="photos/val"), None)
    assert name == "test" and len(held_out["test"]) == 2


def test_folders_that_hold_several_splits(world):
    with pytest.raises(UserError, match=r"train_file: folder 'mixed' holds tables of several splits \(test, train\)"):
        load_splits(DataArguments(train_file="mixed"))
    with pytest.raises(UserError, match=r"test_file: folder 'photos' holds several splits \(train, validation\)"):
        load_splits(DataArguments(train_file="photos/train", test_file="photos"))
    with pytest.raises(UserError, match="an image folder is not streamed"):
        open_streams(DataArguments(train_file="photos/train", streaming=True))


@pytest.mark.parametrize(
    ("word", "key"),
    [("one/a.csv", "test_file"), ("photos", "dataset_name"), ("bundled:imdb", "dataset_name"), ("a/b", "dataset_name")],
)
def test_the_second_word_of_evaluate(word, key, world):
    values = {"test_file": None, "dataset_name": None}
    _take_data(word, values)
    assert values.pop(key) == word and not any(values.values())
    with pytest.raises(UserError, match="was given as DATA too"):
        _take_data(word, {"test_file": None, "dataset_name": "imdb"})


def test_the_second_word_of_evaluate_does_not_exist(world):
    with pytest.raises(UserError, match=r"'one/c.csv' does not exist"):
        _take_data("one/c.csv", {"test_file": None, "dataset_name": None})
