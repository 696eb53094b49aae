"""Data that is a Python object."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image as Pixels

from hf_transfer import Predictor, UserError, fine_tune
from hf_transfer.data.in_memory import splits_of

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
    ("given", "said"),
    [
        ([1, 2], "unsupported type list for the train split"),
        ({"train": 3}, "unsupported type int for the train split"),
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
