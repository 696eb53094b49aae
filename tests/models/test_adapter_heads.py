"""Adapters that peft saved without `config.json`: what they predict is read from their file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from hf_transfer import Predictor, UserError
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.models.source import processor_source, read_config
from tests.helpers import tiny_timm_vit

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
TEXT = "AutoModelForSequenceClassification"
CASES = {  # auto class, backbone, kind of task for peft, what LoRA goes on, head
    "roberta": (
        TEXT,
        lambda: t.RobertaModel(t.RobertaConfig(vocab_size=40, **SMALL)),
        "SEQ_CLS",
        "query",
        "classifier",
    ),
    "distilbert": (
        TEXT,
        lambda: t.DistilBertModel(t.DistilBertConfig(vocab_size=40, dim=8, hidden_dim=16, n_layers=1, n_heads=2)),
        None,
        "q_lin",
        "classifier",
    ),
    "vit": (
        "AutoModelForImageClassification",
        lambda: t.ViTModel(t.ViTConfig(image_size=32, patch_size=16, **SMALL)),
        None,
        "q_proj",
        "classifier",
    ),
    "timm": ("AutoModelForImageClassification", lambda: tiny_timm_vit(labels=2), None, "qkv", "head"),
}


def saved_by_peft(folder: Path, name: str, labels: int) -> Path:
    """An adapter on a saved backbone, as a script that uses peft alone leaves it."""
    auto, backbone, task, target, head = CASES[name]
    backbone().save_pretrained(folder / "base")
    model = getattr(t, auto).from_pretrained(folder / "base", num_labels=labels, ignore_mismatched_sizes=True)
    config = peft.LoraConfig(task_type=task, target_modules=[target], modules_to_save=[head])
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize(("name", "labels"), [("roberta", 5), ("distilbert", 1), ("vit", 3), ("timm", 4)])
def test_the_number_of_labels_is_the_heads(name, labels, tmp_path):
    config = read_config(ModelArguments(str(saved_by_peft(tmp_path, name, labels))))
    assert config.num_labels == labels and config.id2label == {i: f"LABEL_{i}" for i in range(labels)}
    assert config.architectures[0].endswith("Classification") and config.problem_type is None


def test_pictures_are_answered_as_by_peft(tiny_vit_folder, tmp_path):
    """With the backbone's image processor; the backbone's own two labels are not taken for the adapter's."""
    model = t.AutoModelForImageClassification.from_pretrained(tiny_vit_folder)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config).eval()
    torch.nn.init.normal_(adapted.base_model.model.classifier.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path)
    loaded = Predictor.load(tmp_path)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(pixels).logits, adapted(pixels).logits)
    assert loaded.task.name == "image-classification" and loaded.labels.names == ("LABEL_0", "LABEL_1")
    assert processor_source(ModelArguments(str(tmp_path)))[0] == tiny_vit_folder


def test_a_head_of_the_backbone_keeps_its_labels(tiny_bert_folder, tmp_path):
    """The adapter trained no head: the one of the classifier that it goes on is used."""
    base = shutil.copytree(tiny_bert_folder, tmp_path / "base")
    path = base / "config.json"
    names = {"0": "no", "1": "yes"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names}))
    model = t.AutoModelForSequenceClassification.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    assert Predictor.load(tmp_path / "adapter").labels.names == ("no", "yes")


def test_without_any_head_it_is_refused(tmp_path, tiny_bert_folder):
    adapter = saved_by_peft(tmp_path, "roberta", 3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_bert_folder) / name, tmp_path / "base")
    weights = adapter / "adapter_model.safetensors"
    save_file({n: p for n, p in load_file(weights).items() if "classifier" not in n}, weights)
    with pytest.raises(UserError, match="holds no head for image-classification or text-classification"):
        Predictor.load(adapter)
    torch.save({}, adapter / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors.*allow_pickle"):
        Predictor.load(adapter)
