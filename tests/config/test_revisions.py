"""`owner/name@revision` in the place of a model."""

from __future__ import annotations

import pytest

from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.places import split_revision
from hf_transfer.errors import UserError
from hf_transfer.models.source import read_config
from hf_transfer.settings import Config


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name@v1", ("owner/name", "v1")),
        ("name@v1", ("name", "v1")),
        ("timm/resnet18.a1_in1k@main", ("timm/resnet18.a1_in1k", "main")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@", ("owner/name@", None)),
        ("owner/name", ("owner/name", None)),
        ("./run@v1", ("./run@v1", None)),
        ("a/b/c@v1", ("a/b/c@v1", None)),
        ("/runs/me@home", ("/runs/me@home", None)),
        ("bundled:minilm-l6@v1", ("bundled:minilm-l6@v1", None)),
    ],
)
def test_what_is_a_revision(name, parts):
    assert split_revision(name) == parts


def test_a_folder_with_the_sign_in_its_name_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_revision("owner/name@v1") == ("owner/name@v1", None)


def test_a_run_records_the_name_and_the_revision():
    keys = {"model_name_or_path": "owner/name@v1", "dataset_name": "bundled:digits", "output_dir": "out"}
    config = Config.from_sources({}, keys)
    assert (config.model.model_name_or_path, config.model.model_revision) == ("owner/name", "v1")
    assert (config.values["model_name_or_path"], config.values["model_revision"]) == ("owner/name", "v1")
    assert Config.from_sources({}, {**keys, "model_revision": "v1"}).model == config.model
    with pytest.raises(UserError, match="model_revision: 'v2' contradicts 'owner/name@v1'"):
        Config.from_sources({}, {**keys, "model_revision": "v2"})


def test_only_a_hub_has_revisions(tmp_path):
    for name in (str(tmp_path), "bundled:minilm-l6"):
        with pytest.raises(UserError, match=r"model_revision: .* only models on a hub have revisions"):
            read_config(ModelArguments(name, model_revision="v1"))
