"""The classes of a model's blocks, which FSDP 2 shards one by one."""

from __future__ import annotations

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from hf_transfer.layers.blocks import block_classes
from hf_transfer.layers.groups import layer_groups
from tests.helpers import tiny_bert, tiny_vit


def classes(model):
    return block_classes(model, layer_groups(model))


def test_transformers():
    assert classes(tiny_bert()) == ("BertLayer",), "also of the last group, which the pooler is in"
    assert classes(tiny_vit()) == ("ViTLayer",)
    sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=40)
    modern = ModernBertConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    assert classes(ModernBertForSequenceClassification(modern)) == ("ModernBertEncoderLayer",)


def test_adapters_change_nothing():
    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    assert classes(adapted) == ("BertLayer",)


def test_timm():
    with torch.device("meta"):
        assert classes(timm.create_model("resnet18")) == ("BasicBlock",)
        assert classes(timm.create_model("efficientnet_lite0")) == ("DepthwiseSeparableConv", "InvertedResidual")


def test_modules_of_torch_are_no_blocks():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    rules = [("^3", "head"), *((f"^{i}", i) for i in range(3))]
    groups = layer_groups(model, rules)
    assert block_classes(model, groups) == ()
