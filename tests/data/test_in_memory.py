"""Data that is a Python object."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image as Pixels

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.images import undecoded
from hf_transfer.data.in_memory import splits_of
from hf_transfer.data.labels import LABELS
from hf_transfer.tasks import choose_task
from hf_transfer.tasks.image_classification import ImageClassification

ROWS = {"text": [f"words {i}" for i in range(20)], "label": ["no", "yes"] * 10}


def test_every_form_gives_the_same_rows():
    frame, data = pd.DataFrame(ROWS, index=range(5, 25)), Dataset.from_dict(ROWS)
    for given in (frame, data, data.with_format("numpy"), {"train": frame}, DatasetDict({"training": data})):
        made = splits_of(given)
        assert list(made) == ["train"] and made["train"].to_dict() == ROWS
    assert set(splits_of({"train": frame, "val": data})) == {"train", "validation"}


def test_a_frame_of_categories_and_pictures():
    pictures = [Pixels.fromarray(np.full((4, 4, 3), i, np.uint8)) for i in range(3)]
    kinds = pd.Categorical(["b", "a", "b"], categories=["b", "a", "never"])
    made = splits_of(pd.DataFrame({"image": pictures, "kind": kinds}))["train"]
    assert made.features["kind"] == ClassLabel(names=["b", "a", "never"]) and made["kind"][:] == [0, 1, 0]
    assert made[2]["image"].getpixel((0, 0)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("categories", "names"),
    [
        ([3, 1, 2], ["3", "1", "2"]),
        ([1.5, 0.5, 2.0], ["1.5", "0.5", "2"]),
        ([True, False], ["True", "False"]),
        (["b", "a", "never"], ["b", "a", "never"]),
        (list(pd.to_datetime(["2024-01-02", "2024-01-01"])), ["2024-01-02", "2024-01-01"]),
        (list(pd.interval_range(0, 2)), ["(0, 1]", "(1, 2]"]),
    ],
)
def test_categories_of_any_kind_are_the_classes_in_their_order(categories, names):
    kinds = pd.Categorical([categories[1], None, categories[0]], categories=categories)
    made = splits_of(pd.DataFrame({"text": ["a", "b", "c"], "kind": kinds}))["train"]
    assert made.features["kind"] == ClassLabel(names=names) and made["kind"][:] == [1, None, 0]


def test_categories_that_are_texts_or_numbers():
    frame = pd.DataFrame({"text": ["a", "b"], "score": [2, 1]}).astype("category")
    made = splits_of(frame, DataArguments(problem_type="regression"))["train"]
    assert made.to_dict() == {"text": ["a", "b"], "score": [2, 1]}
    assert splits_of(frame)["train"].features == Features(
        {"text": Value("string"), "score": ClassLabel(names=["1", "2"])}
    )


# ---- images ----


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        Pixels.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(12)]


FORMS = {
    "paths": lambda files: pd.DataFrame({"image": [str(f) for f in files]}),
    "Path objects": lambda files: pd.DataFrame({"file": files}),
    "bytes": lambda files: pd.DataFrame({"image": [f.read_bytes() for f in files]}),
    "cells": lambda files: pd.DataFrame({"photo": [{"bytes": f.read_bytes(), "path": None} for f in files]}),
    "images": lambda files: pd.DataFrame({"photo": [Pixels.open(f) for f in files]}),
    "arrays": lambda files: pd.DataFrame({"photo": [np.asarray(Pixels.open(f)) for f in files]}),
    "a dataset of paths": lambda files: Dataset.from_dict({"image": [str(f) for f in files]}),
    "a dataset of bytes": lambda files: Dataset.from_dict({"image": [f.read_bytes() for f in files]}),
    "a dataset of images": lambda files: Dataset.from_dict({"photo": [Pixels.open(f) for f in files]}),
}


def with_labels(table):
    labels = ["no", "yes"] * 6
    return table.assign(label=labels) if isinstance(table, pd.DataFrame) else table.add_column("label", labels)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_images_is_read_alike(form, images):
    splits = splits_of(with_labels(FORMS[form](images)))
    task, inputs = choose_task(splits["train"].features, DataArguments())
    assert task.name == "image-classification"
    read = undecoded(task.prepare(splits["train"].rename_column("label", LABELS), inputs, None, None), inputs)
    for cell, file in zip(read.with_format(None)[inputs[0]], images, strict=True):
        assert np.array_equal(np.asarray(task.read(cell)), np.asarray(Pixels.open(file)))
        assert task.trace([cell]).sizes == {"width": 16, "height": 16}


def test_a_frame_of_bytes_and_a_parquet_file_of_bytes_train_alike(images, tiny_vit_folder, tmp_path):
    """Examined before training; the run reads such a file again."""
    frame = with_labels(FORMS["bytes"](images))
    frame.to_parquet(tmp_path / "d.parquet")
    keys = dict(num_train_epochs=1, save_strategy="no", log_level="error", on_bad_example="skip")
    run = fine_tune(tiny_vit_folder, frame, output_dir=str(tmp_path / "a"), **keys)
    same = fine_tune(tiny_vit_folder, train_file=str(tmp_path / "d.parquet"), output_dir=str(tmp_path / "b"), **keys)
    assert run.metrics == same.metrics and same.evaluate()["metrics"] == same.metrics
    assert run.results["data_facts"]["splits"]["train"]["examined"] == 9
    assert [a["scores"] for a in run.predict(images)] == [a["scores"] for a in run.predict(frame)]


def test_columns_that_hold_no_images():
    """Bytes of another name are images only if images are asked for."""
    features = {"data": Value("binary"), "label": Value("string")}
    assert ImageClassification().input_columns(features, DataArguments()) == ()
    assert ImageClassification().input_columns(features, DataArguments(task="image-classification")) == ("data",)
    texts = pd.DataFrame({"path": ["a.png", "b.png"], "label": ["x", "y"]})
    (split,) = splits_of(texts, DataArguments(task="text-classification")).values()
    assert split.features["path"].dtype in ("string", "large_string")
    with pytest.raises(UserError, match="row 1 of column 'photo' of the train DataFrame cannot be read as an image"):
        splits_of(pd.DataFrame({"photo": [np.zeros((2, 2)), np.zeros((2, 2, 2, 2))]}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1, 2], "unsupported type list for the train split"),
        ({"train": 3}, "unsupported type int for the train split"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), "the train DataFrame has several columns called 'x'"),
        (
            pd.DataFrame({"x": pd.period_range("2024", periods=2)}),
            "column 'x' of the train DataFrame holds Period values",
        ),
        (pd.DataFrame({"x": [1j, 2j]}), "column 'x' of the train DataFrame holds complex values"),
        (pd.DataFrame({"x": ["half \ud800"]}, dtype=object), "column 'x' of the train DataFrame holds str values"),
        (pd.DataFrame({0: ["a"]}), "column name 0 of the train DataFrame is not a string"),
        ({}, "must be split names"),
    ],
)
def test_what_is_no_data(given, said):
    with pytest.raises(UserError, match=said):
        splits_of(given)


def test_a_run_on_a_frame(tiny_bert_folder, tmp_path):
    frames = {"train": pd.DataFrame(ROWS), "test": pd.DataFrame(ROWS).head(6)}
    run = fine_tune(tiny_bert_folder, frames, output_dir=str(tmp_path / "o"), num_train_epochs=1, save_strategy="no")
    assert run.results["labels"] == ["no", "yes"] and run.results["metrics_split"] == "test"
    assert run.results["dataset"] == "in memory"
    assert run.evaluate()["metrics"]["accuracy"] == run.metrics["accuracy"]
    with pytest.raises(UserError, match="the run's data was a Python object"):
        Predictor.load(run.output_dir).evaluate()


def test_a_column_of_several_kinds_is_refused_by_name():
    frame = pd.DataFrame({"text": ["a", "b"], "label": [1, "1"]})
    with pytest.raises(UserError, match="column 'label' of the train DataFrame mixes int and str"):
        splits_of(frame)
