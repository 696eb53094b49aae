"""When a checkpoint's head is kept, and what is said about it."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.labels import Labels
from hf_transfer.models.load import load_config, load_model

TINY = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


def load(folder, *names):
    args = ModelArguments(str(folder))
    config = load_config(args, AutoModelForSequenceClassification)
    return load_model(args, AutoModelForSequenceClassification, config, Labels("single_label_classification", names))


def test_a_head_with_generic_names_is_kept_for_numbers(tmp_path):
    """A checkpoint of a script that named no classes: LABEL_0, LABEL_1."""
    trained = BertForSequenceClassification(BertConfig(**TINY, num_labels=2))
    trained.save_pretrained(tmp_path)
    kept = load(tmp_path, "0", "1")
    assert torch.equal(kept.model.classifier.weight, trained.classifier.weight) and not kept.fresh
    assert kept.model.config.id2label == {0: "0", 1: "1"}
    assert kept.notes == ("The checkpoint's head is kept: its LABEL_0, LABEL_1 are taken for 0, 1.",)


def test_a_new_head_is_not_explained_by_a_missing_one_where_there_is_one(tmp_path):
    BertForSequenceClassification(BertConfig(**TINY, num_labels=2)).save_pretrained(tmp_path / "head")
    for names in (("a", "b"), ("0", "1", "2")):
        loaded = load(tmp_path / "head", *names)
        assert "classifier.weight" in loaded.fresh
        assert loaded.notes[0].endswith("the checkpoint predicts LABEL_0, LABEL_1.")
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "none")
    assert load(tmp_path / "none", "a", "b").notes[0].endswith("the checkpoint has none.")
