"""Data that is a Python object."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image as Pixels

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.data.images import undecoded
from hf_transfer.data.in_memory import splits_of
from hf_transfer.data.labels import LABELS
from hf_transfer.errors import from_command_line, option
from hf_transfer.tasks import choose_task
from hf_transfer.tasks.image_classification import ImageClassification

QUICK = dict(num_train_epochs=1, save_strategy="no", log_level="error", strategy="full", preflight=False)
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
    keys = dict(num_train_epochs=1, refit=False, save_strategy="no", log_level="error", on_bad_example="skip")
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
    with pytest.raises(UserError, match="row 1 of column 'photo' of the train data cannot be read as an image"):
        splits_of(pd.DataFrame({"photo": [np.zeros((2, 2)), np.zeros((2, 2, 2, 2))]}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1, 2], "unsupported type list for the train split"),
        ({"train": 3}, "unsupported type int for the train split"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), "the train data has several columns called 'x'"),
        (
            pd.DataFrame({"x": pd.period_range("2024", periods=2)}),
            "column 'x' of the train data holds Period values",
        ),
        (pd.DataFrame({"x": [1j, 2j]}), "column 'x' of the train data holds complex values"),
        (pd.DataFrame({"x": ["half \ud800"]}, dtype=object), "column 'x' of the train data holds str values"),
        (pd.DataFrame({0: ["a"]}), "column name 0 of the train data is not a string"),
        ({}, "must be split names"),
    ],
)
def test_what_is_no_data(given, said):
    with pytest.raises(UserError, match=said):
        splits_of(given)


def test_a_run_on_a_frame(tiny_bert_folder, tmp_path):
    frames = {"train": pd.DataFrame(ROWS), "test": pd.DataFrame(ROWS).head(6)}
    run = fine_tune(tiny_bert_folder, frames, output_dir=str(tmp_path / "o"), **QUICK)
    assert run.results["labels"] == ["no", "yes"] and run.results["metrics_split"] == "test"
    assert run.results["dataset"] == "in memory"
    assert run.evaluate()["metrics"]["accuracy"] == run.metrics["accuracy"]
    with pytest.raises(UserError, match="the run's data was a Python object"):
        Predictor.load(run.output_dir).evaluate()


def test_a_column_of_several_kinds_is_refused_by_name():
    frame = pd.DataFrame({"text": ["a", "b"], "label": [1, "1"]})
    with pytest.raises(UserError, match="column 'label' of the train data mixes int and str"):
        splits_of(frame)


# ---- what `fine_tune` takes ----

TABLES = {
    "a dict of columns": ROWS,
    "of arrays": {"text": np.array(ROWS["text"]), "label": pd.Series(ROWS["label"], index=range(7, 27))},
    "a list of dicts": [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)],
    "a pair": (ROWS["text"], ROWS["label"]),
    "a pair of arrays": (np.array(ROWS["text"]), np.array(ROWS["label"])),
    "a frame and labels": (pd.DataFrame(ROWS)[["text"]], ROWS["label"]),
    "columns of a dataset": (Dataset.from_dict(ROWS)["text"], Dataset.from_dict(ROWS)["label"]),
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_in_every_form(form):
    made = splits_of({"train": TABLES[form], "val": pd.DataFrame(ROWS)})
    assert splits_of(TABLES[form])["train"].to_dict() == made["train"].to_dict() == ROWS
    assert list(made) == ["train", "validation"] and list(splits_of(TABLES[form], name="test")) == ["test"]


def test_columns_of_every_type():
    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    for given in ({"image": pixels, "label": [1, 0, 1]}, (pixels, [1, 0, 1]), ([*pixels], np.array([1, 0, 1]))):
        made = splits_of(given)["train"]
        assert np.array_equal(np.asarray(made[2]["image"]), pixels[2]) and made["label"][:] == [1, 0, 1]
    several = splits_of((["a", "b"], np.eye(2, dtype=int)))["train"]
    assert several["label"][:] == [[1, 0], [0, 1]]
    pairs = splits_of(([("a", "b"), ("c", "d")], [0.5, 1.5]))["train"]
    assert pairs[1] == {"sentence1": "c", "sentence2": "d", "label": 1.5}
    named = DataArguments(text_column_name="review", label_column_name="stars")
    assert splits_of((["a"], [1]), named)["train"][0] == {"review": "a", "stars": 1}
    holes = splits_of([{"text": "a", "n": 1}, {"text": "b"}])["train"]
    assert holes.to_dict() == {"text": ["a", "b"], "n": [1, None]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((["a", "b"], [1]), "dataset: the columns differ in length: text 2, label 1"),
        ({"text": ["a"], "label": [1, 2]}, "dataset: the columns differ in length: text 1, label 2"),
        ({"text": ["a", 1], "label": [1, 2]}, "column 'text' of the train data mixes int and str"),
        ({"train": ("a", "b")}, "unsupported type tuple for the train split"),
    ],
)
def test_columns_that_do_not_fit(given, said):
    with pytest.raises(UserError, match=said):
        splits_of(given)


def test_held_out_data_of_its_own(tiny_bert_folder, tmp_path, monkeypatch):
    """In memory next to data in memory or in files, and a file next to data in memory; without an output folder."""
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(ROWS).to_csv("train.csv", index=False)
    pd.DataFrame(ROWS).head(8).to_csv("validation.csv", index=False)
    held, test = {k: v[:8] for k, v in ROWS.items()}, (["words 3", "words 4"], ["yes", "no"])
    runs = [
        fine_tune(tiny_bert_folder, ROWS, eval_dataset=held, test_dataset=test, **QUICK),
        fine_tune(tiny_bert_folder, train_file="train.csv", eval_dataset=held, test_dataset=test, **QUICK),
        fine_tune(tiny_bert_folder, ROWS, eval_dataset="validation.csv", test_dataset=test, **QUICK),
    ]
    assert len({str(run.metrics) + str(run.results["validation_metrics"]) for run in runs}) == 1
    assert runs[0].results["metrics_split"] == "test" and runs[1].evaluate(split="validation")["num_examples"] == 8
    assert [str(run.output_dir) for run in runs[:2]] == ["runs/in-memory-bert-1", "runs/train-bert-1"]
    with pytest.raises(UserError, match="_file: the run's data was a Python object"):
        Predictor.load(runs[1].output_dir).evaluate()
    with pytest.raises(UserError, match="eval_dataset and validation_file contradict each other"):
        fine_tune(tiny_bert_folder, ROWS, eval_dataset=held, validation_file="validation.csv")
    with pytest.raises(UserError, match="eval_dataset: the dataset has a validation split already"):
        fine_tune(tiny_bert_folder, {"train": ROWS, "val": held}, eval_dataset=held)
    with pytest.raises(UserError, match="eval_dataset: expected one split, got train, test"):
        fine_tune(tiny_bert_folder, ROWS, eval_dataset={"train": ROWS, "test": held})
    with pytest.raises(UserError, match="streaming: this data is already on disk or in memory"):
        stream = dict(streaming=True, max_steps=1, max_eval_samples=4, max_predict_samples=4)
        fine_tune(tiny_bert_folder, train_file="train.csv", eval_dataset=held, **stream)


def test_messages_are_worded_for_who_reads_them(tiny_bert_folder, tmp_path, capsys):
    """In Python as keywords, after a command as options."""
    (tmp_path / "results.json").write_text("{}")
    pd.DataFrame(ROWS).to_csv(tmp_path / "d.csv", index=False)
    with pytest.raises(UserError, match=r"add overwrite_output_dir=True\.$"):
        fine_tune(tiny_bert_folder, str(tmp_path / "d.csv"), output_dir=str(tmp_path))
    assert main(["train", tiny_bert_folder, str(tmp_path / "d.csv"), str(tmp_path)]) == 2
    assert "add --overwrite_output_dir.\n" in capsys.readouterr().err
    assert option("resume_from_checkpoint", "auto") == "resume_from_checkpoint='auto'"
    with from_command_line(), from_command_line():
        assert option("output_dir", "a b") == "--output_dir 'a b'" and option("merged") == "--merged"
