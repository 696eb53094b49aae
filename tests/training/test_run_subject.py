"""What a run is about is compared by content: every label, images by their bytes, the adapter, the backbone."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Picture

from hf_transfer.adapters.attach import attach
from hf_transfer.training import run_subject
from tests.helpers import arguments, texts, tiny_bert

ROWS = 300  # more than are sampled


def read_again(facts):
    return json.loads(json.dumps(facts))


def test_a_label_that_was_flipped_anywhere_is_seen():
    data = texts(ROWS)
    facts, seen = run_subject.data_facts(data), set()
    for row in range(0, ROWS, 7):
        labels = list(data["labels"])
        labels[row] = 1 - labels[row]
        other = run_subject.data_facts(data.remove_columns("labels").add_column("labels", labels))
        (said,) = run_subject.changed(facts, other, ())
        assert "differ" in said
        seen.add(other["labels"])
    assert len(seen) == len(range(0, ROWS, 7))


@pytest.mark.parametrize(
    "labels",
    [[[0.0, 1.0], [1.0, 0.0]] * 4, [0.5, -1.0] * 4, ["a", "b"] * 4],
)
def test_labels_of_every_kind_count(labels):
    data = Dataset.from_dict({"input_ids": [[1, 2]] * 8, "labels": labels})
    other = Dataset.from_dict({"input_ids": [[1, 2]] * 8, "labels": labels[::-1]})
    one, two = run_subject.data_facts(data), run_subject.data_facts(other)
    assert one["labels"] is not None and one["labels"] != two["labels"]
    assert run_subject.data_facts(data.select(range(8)))["labels"] == one["labels"]


def pictures(folder, shade):
    folder.mkdir(parents=True)
    for i in range(6):
        Picture.new("RGB", (4, 4), (shade, 40 * i, 0)).save(folder / f"{i}.png")
    paths = [str(folder / f"{i}.png") for i in range(6)]
    return Dataset.from_dict({"image": paths, "labels": [0, 1] * 3}).cast_column("image", Image(decode=False))


def test_images_are_compared_by_content(tmp_path):
    """Under another mount they are the same; under the same names, others."""
    here = pictures(tmp_path / "here", 10)
    then = run_subject.data_facts(here)
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere")
    moved = Dataset.from_dict(
        {"image": [str(tmp_path / "elsewhere" / f"{i}.png") for i in range(6)], "labels": here["labels"]}
    ).cast_column("image", Image(decode=False))
    assert run_subject.changed(then, run_subject.data_facts(moved), ()) == []
    shutil.rmtree(tmp_path / "here")
    others = pictures(tmp_path / "here", 99)
    (said,) = run_subject.changed(then, run_subject.data_facts(others), ())
    assert said == "the training examples differ (same number, other content)"
    shutil.rmtree(tmp_path / "elsewhere")
    assert run_subject.data_facts(moved)["inputs"] not in (then["inputs"], None)  # the files are gone


def test_an_earlier_versions_digest_is_compared_as_it_was():
    now = run_subject.data_facts(texts(8))
    then = {k: v for k, v in now.items() if k not in ("inputs", "labels")}
    assert run_subject.changed(then, now, ()) == []
    assert run_subject.changed(then, run_subject.data_facts(texts(8, seed=1)), ()) != []


# ---- adapter and backbone ------------------------------------------------------------------------------------------


def adapted(folder, **keys):
    return attach(tiny_bert(), arguments(folder, strategy="full", **{"adapter": "lora", **keys}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_r": 4}, "adapter r: 8 then, 4 now"),
        ({"lora_target_modules": ["query"]}, "adapter target_modules: 13 then, 2 now"),
        ({"adapter": "dora"}, "adapter use_dora: False then, True now"),
    ],
)
def test_the_adapter_itself_is_compared(keys, said, tmp_path):
    """As where it comes from a file, and no key says what it is."""
    then = {**run_subject.data_facts(texts(4)), "adapter": read_again(run_subject.adapter_facts(adapted(tmp_path)))}
    now = {**then, "adapter": read_again(run_subject.adapter_facts(adapted(tmp_path, **keys)))}
    assert any(told.startswith(said) for told in run_subject.changed(then, now, ()))
    assert run_subject.changed(then, now, ["lora_r"]) == []  # the key's own words are enough
    assert run_subject.changed(then, {**then, "adapter": None}, ()) == []


def test_what_follows_from_the_length_of_a_run_is_not_the_adapters(tmp_path):
    model = adapted(tmp_path, adapter="adalora")
    then = run_subject.adapter_facts(model)
    model.active_peft_config.total_step, model.active_peft_config.tinit = 500, 7
    model.active_peft_config.base_model_name_or_path = "/elsewhere"
    assert run_subject.adapter_facts(model) == then


def test_the_backbone_is_compared_by_its_weights(tmp_path):
    facts = run_subject.data_facts(texts(4))
    then = {**facts, "backbone": read_again(run_subject.backbone_facts(tiny_bert()))}
    assert run_subject.changed(then, {**facts, "backbone": run_subject.backbone_facts(tiny_bert())}, ()) == []
    other = tiny_bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[3, 2] += 1e-6
    (said,) = run_subject.changed(then, {**facts, "backbone": run_subject.backbone_facts(other)}, ())
    assert "(1 of 41 tensors differ: bert.encoder.layer.0.output.dense.weight)" in said
    config = tiny_bert(layer_norm_eps=1e-3)
    now = {**facts, "backbone": run_subject.backbone_facts(config)}
    assert run_subject.changed(then, now, ()) == ["backbone: another configuration (same weights)"]
    newer = copy.deepcopy(now)
    newer["backbone"]["transformers"] = "99.0"  # whose configurations contain more
    assert run_subject.changed(then, newer, ()) == []
    assert run_subject.changed(facts, now, ()) == []  # an earlier version recorded none


def test_random_weights_are_no_identity():
    one, other = (run_subject.backbone_facts(m, is_random=True) for m in (tiny_bert(), tiny_bert().half()))
    assert one["tensors"] == other["tensors"] == {}
