"""What the names of models and data refer to, as far as the disk tells."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
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
    kind_of_data,
)
from hf_transfer.config.timm_sources import unknown_model
from hf_transfer.data.bundled import DATASETS, HUB
from hf_transfer.data.header import check_header
from hf_transfer.errors import from_command_line
from hf_transfer.models.timm_names import prefix_hint

NAMES = ("train_file", "validation_file", "test_file", "dataset_name", "label_column_name", "text_column_name",
         "image_column_name", "split_group_column_name")  # fmt: skip


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


def test_the_kind_of_data(tmp_path):
    """A text that mentions an image is a text; a table that lists images is about images."""
    pictures = {
        "quoted.csv": 'label,"file"\na,"my cat.png"\nb,"b.JPG"\n',
        "list.jsonl": '{"image": "a/b.png", "label": 1}\n' * 3,
        "pretty.json": '[\n {\n  "image": "a.png",\n  "label": 1\n },\n {\n  "image": "b.png",\n  "label": 0\n }\n]',
        "tabs.tsv": "label\timage\na\tx.webp\n",
    }
    texts = {
        "mention.csv": "text,label\nsee my photo.png here,a\nnothing to see in cat.jpg today,b\n",
        "once.csv": "text,label\n" + "a.png,x\n" + "a text,y\n" * 5,
        "address.csv": "text,label,url\na,b,https://example.org/1.png\n",
        "list.jsonl": '{"text": "a", "label": 1}\n',
        "header.csv": "text,label\n",
    }
    for kind, files in (("image", pictures), ("text", texts)):
        for name, written in files.items():
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / name).write_text(written)
            (tmp_path / kind / f"{name}.gz").write_bytes(gzip.compress(written.encode()))
            assert kind_of_data(f"{kind}/{name}") == kind_of_data(f"{kind}/{name}.gz") == kind, name
        assert kind_of_data(kind) == kind
    for kind, cell in (("image", {"bytes": b"x", "path": None}), ("image", "a.png"), ("image", b"x"), ("text", "so")):
        pyarrow.parquet.write_table(pyarrow.table({"x": [cell] * 3, "label": [0, 1, 0]}), "table.parquet")
        assert kind_of_data("table.parquet") == kind, cell
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "torn.csv.gz").write_bytes(b"no gzip")
    assert not any(map(kind_of_data, ("torn.parquet", "torn.csv.gz", "empty", "model", "owner/name", "")))
    assert kind_of_data("my photos") == kind_of_data("bundled:digits") == "image"


def test_names_of_timm_are_read_from_its_sources():
    pytest.importorskip("timm")
    for name in ("resnet50", "resnet50.a1_in1k", "tv_resnext50_32x4d", "vit_base_patch16_224_in21k"):
        assert not unknown_model(name), name
    assert unknown_model("resnet5O.a1_in1k") == "timm has no model 'resnet5O'. Did you mean 'timm/resnet50'?"
    assert unknown_model("qqqq") == "timm has no model 'qqqq'."


def test_columns_that_the_header_does_not_have(tmp_path):
    values = dict.fromkeys((*NAMES, "on_bad_example"))
    for given in ({"label_column_name": "label"}, {"text_column_name": ["text", "label"]}, {}):
        check_header({**values, "train_file": "reviews.csv", **given})
    check_header({**values, "dataset_name": "owner/name", "label_column_name": "x"})
    with pytest.raises(UserError, match=r"label_column_name: column 'lable' does not exist. .* Did you mean 'label'"):
        check_header({**values, "dataset_name": "reviews.csv", "label_column_name": ["text", "lable"]})


def test_columns_of_other_files_and_folders(tmp_path):
    """Each row of a JSON file may have other columns, a test file no labels, no file of a folder all."""
    values = dict.fromkeys((*NAMES, "on_bad_example"))
    rows = [{"text": "a", "label": 1}] * 3 + [{"text": "b", "label": 0, "note": None}]
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), "table.parquet")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("text,label,note\na,1,x\n")
    (tmp_path / "tables" / "test.csv").write_text("text\nb\n")
    for file in ("lines.jsonl", "list.json", "table.parquet", "tables"):
        for column in ("text", "note"):
            check_header({**values, "train_file": file, "text_column_name": column, "label_column_name": "label"})
        with pytest.raises(UserError, match=r"column 'lable' does not exist\. The columns are .*text.* mean 'label'"):
            check_header({**values, "dataset_name": file, "text_column_name": "text", "label_column_name": "lable"})
        with pytest.raises(UserError, match=rf"column 'txt' does not exist in test_file '{file}'"):
            check_header({**values, "train_file": "x.csv", "test_file": file, "text_column_name": "txt"})
    check_header({**values, "train_file": "tables", "test_file": "tables/test.csv", "label_column_name": "label"})
    with pytest.raises(UserError, match="column 'label' does not exist in validation_file"):
        check_header({**values, "validation_file": "tables/test.csv", "label_column_name": "label"})
    (tmp_path / "tables" / "a.png").touch()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "torn.json").write_text("[{")
    for unread in ("tables", "torn.parquet", "torn.json", "owner/name"):
        check_header({**values, "dataset_name": unread, "label_column_name": "lable"})
