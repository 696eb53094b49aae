"""What the names of models and data refer to, as far as the disk tells."""

from __future__ import annotations

import pytest

from hf_transfer import UserError
from hf_transfer.config.places import (
    BUNDLED_DATA,
    BUNDLED_MODELS,
    check_data,
    check_model,
    check_places,
    data_hint,
    data_in_place_of_model,
)
from hf_transfer.data.bundled import DATASETS, HUB
from hf_transfer.errors import from_command_line
from hf_transfer.models.timm_names import prefix_hint


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    (tmp_path / "paths.csv").write_text("file,label\na.jpg,b\n")
    (tmp_path / "my photos" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "my photos" / "train" / "cat" / "1.JPG").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_bundled_names_are_those_that_can_be_loaded():
    assert set(BUNDLED_DATA) == set(DATASETS) and set(HUB) == {*BUNDLED_DATA, *BUNDLED_MODELS}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("minilm", "'bundled:minilm-l6'?"),
        ("minilm-l6", "'bundled:minilm-l6'?"),
        ("MiniLM_L6", "'bundled:minilm-l6'?"),
        ("efficientnet-lite0", "'bundled:efficientnet-lite0'?"),
        ("bundled:minilm", "'bundled:minilm-l6'?"),
        ("bundled:bert", "Available names: bundled:minilm-l6"),
        ("./modle", "Did you mean 'model'?"),
        ("reviews.csv", "hf-transfer train bundled:minilm-l6 reviews.csv"),
        ("paths.csv", "hf-transfer train bundled:efficientnet-lite0 paths.csv"),
        ("my photos", "hf-transfer train bundled:efficientnet-lite0 'my photos'"),
        ("bundled:digits", "hf-transfer train bundled:efficientnet-lite0 bundled:digits"),
    ],
)
def test_no_model_has_this_name(name, said):
    with pytest.raises(UserError) as error, from_command_line():
        check_model(name)
    assert said in str(error.value)


def test_names_that_may_be_models_and_data(tmp_path):
    for name in (
        "model",
        "empty",
        "bert-base-uncased",
        "gpt2",
        "resnet18",
        "timm/resnet18",
        "owner/name",
        *BUNDLED_MODELS,
    ):
        check_model(name)
    for name in ("imdb", "rotten_tomatoes", "owner/name", "*.csv", "my photos", "in memory", *BUNDLED_DATA):
        check_data(name)
    for name in ("run.yaml", "bank.json"):  # what a run or a HeadBank wrote is no data
        (tmp_path / "of a run").mkdir(exist_ok=True)
        (tmp_path / "of a run" / name).touch()
        (tmp_path / "of a run" / "label_issues.csv").touch()
        assert data_in_place_of_model(str(tmp_path / "of a run")) == ""
        (tmp_path / "of a run" / name).unlink()
    assert data_in_place_of_model("empty") == data_in_place_of_model("nothing") == data_in_place_of_model("") == ""


def test_data_that_does_not_exist():
    with pytest.raises(UserError, match=r"'reviws.csv' does not exist. Did you mean 'reviews.csv'"):
        check_data("reviws.csv")
    with pytest.raises(UserError, match=r"test_file: file '.*revews.csv' does not exist. Did you mean 'reviews.csv'"):
        check_places({"model_name_or_path": "model", "dataset_name": None, "train_file": "reviews.csv",
                      "validation_file": "*.csv", "test_file": "revews.csv"})  # fmt: skip
    assert data_hint("fashion-mnis") == "Did you mean 'bundled:fashion-mnist'?" and not data_hint("owner/digits")


def test_a_timm_model_without_its_prefix():
    assert prefix_hint("resnet18") == "Did you mean 'timm/resnet18'?"
    assert prefix_hint("resnet50.a1_in1k") == "Did you mean 'timm/resnet50.a1_in1k'?"
    assert not prefix_hint("bert-base-uncased") and not prefix_hint("microsoft/resnet-50")
