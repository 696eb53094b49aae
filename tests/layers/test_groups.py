"""Every parameter in one group, in the order of the forward pass, the head last and alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

import peft
import pytest
import timm
import torch
import transformers
from torch import nn

from hf_transfer import UserError, layer_groups
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.plan.make import make_plan
from hf_transfer.plan.plan import matches
from tests.helpers import tiny_bert, tiny_timm_resnet, tiny_timm_vit, tiny_vit

TEXT = dict(
    hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=3, vocab_size=50, pad_token_id=0
)
IMAGE = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=3, image_size=32)
THREE = ["layer.0", "layer.1", "layer.2"]
HF_CASES = {
    "bert": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)), THREE),
    "roberta": (lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT)), THREE),
    "xlm-roberta": (
        lambda: transformers.XLMRobertaForSequenceClassification(transformers.XLMRobertaConfig(**TEXT)),
        THREE,
    ),
    "electra": (
        lambda: transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**TEXT, embedding_size=6)),
        THREE,
    ),
    "distilbert": (
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(dim=8, n_heads=2, hidden_dim=16, n_layers=3, vocab_size=50)
        ),
        THREE,
    ),
    "deberta-v2": (
        lambda: transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"])
        ),
        THREE,
    ),
    "mpnet": (lambda: transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**TEXT)), THREE),
    "modernbert": (
        lambda: transformers.ModernBertForSequenceClassification(
            transformers.ModernBertConfig(**TEXT, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0)
        ),
        ["layers.0", "layers.1", "layers.2"],
    ),
    "albert": (
        lambda: transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**TEXT, embedding_size=4)),
        ["albert_layers.0"],
    ),
    "gpt2": (
        lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(n_embd=8, n_head=2, n_layer=3, vocab_size=50, bos_token_id=0, eos_token_id=0)
        ),
        ["h.0", "h.1", "h.2"],
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)),
        ["layers.0", "layers.1", "layers.2"],
    ),
    "deit": (
        lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**IMAGE)),
        ["layers.0", "layers.1", "layers.2"],
    ),
    "beit": (
        lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**IMAGE)),
        ["layers.0", "layers.1", "layers.2"],
    ),
    "dinov2": (
        lambda: transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"})
        ),
        THREE,
    ),
    "resnet": (
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
        ),
        ["stages.0.layers.0", "stages.1.layers.0", "stages.1.layers.1"],
    ),
}


def assert_covers(model: nn.Module) -> list[str]:
    groups = layer_groups(model)
    placed = [name for group in groups for name in group.parameters]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters())
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert all(g.num_parameters == sum(sizes[n] for n in g.parameters) > 0 for g in groups)
    assert groups[-1].name == "head"
    names = [g.name for g in groups]
    assert len(set(names)) == len(names)
    return names


@pytest.mark.parametrize("case", HF_CASES)
def test_hugging_face_models(case):
    make, blocks = HF_CASES[case]
    model = make()
    stem = "stem" if model.main_input_name == "pixel_values" else "embeddings"
    assert assert_covers(model) == [stem, *blocks, "head"]


def test_what_is_between_blocks_and_head_joins_the_last_block():
    groups = {g.name: g.parameters for g in layer_groups(tiny_bert())}
    assert "bert.pooler.dense.weight" in groups["layer.1"]
    assert groups["head"] == ("classifier.weight", "classifier.bias")
    groups = {g.name: g.parameters for g in layer_groups(tiny_vit())}
    assert "vit.layernorm.weight" in groups["layers.1"]


def test_positions_that_the_first_layer_reads_are_in_the_stem():
    model = HF_CASES["deberta-v2"][0]()
    assert "deberta.encoder.rel_embeddings.weight" in layer_groups(model)[0].parameters


def test_tied_parameters_are_counted_once():
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.bias = model.bert.encoder.layer[0].output.dense.bias
    groups = layer_groups(model)
    assert sum(n.endswith("0.output.dense.bias") for g in groups for n in g.parameters) == 1
    assert not any(n.endswith("1.output.dense.bias") for g in groups for n in g.parameters)


TIMM = [
    "resnet10t",
    "vit_tiny_patch16_224",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "densenet121",
    "mixer_s32_224",
    "deit_tiny_distilled_patch16_224",
    "levit_128s",
    "regnetx_002",
    "resnetv2_50",
    "edgenext_xx_small",
    "cait_xxs24_224",
    "repvgg_a0",
    "xcit_nano_12_p16_224",
]


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_follow_timms_own_order(name):
    """Oracle: timm's own `group_parameters`; only its last group is split, into last block and head."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    assert_covers(model)
    from timm.models import group_parameters

    order = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    groups = layer_groups(model)
    declared = model.pretrained_cfg["classifier"]
    declared = (declared,) if isinstance(declared, str) else tuple(declared)
    assert {n.rsplit(".", 1)[0].split(".linear")[0] for n in groups[-1].parameters} <= {
        h.split(".linear")[0] for h in declared
    }
    previous = -1
    for group in groups[:-1]:
        depths = sorted({order[n] for n in group.parameters})
        assert depths[0] == previous + 1, (group.name, depths)
        assert len(depths) == 1 or group is groups[-2], (group.name, depths)
        previous = depths[0]


def exact_rates(groups) -> None:
    """Every parameter of a group has the group's rate: no group's name may fit another one's parameters."""

    @dataclass
    class Keys(PlanArguments):
        learning_rate: float = 1.0
        num_train_epochs: float = 1.0

    stage = make_plan(Keys(layer_lr_decay=0.5), groups).stages[0]
    depth = len(groups) - 1
    for i, group in enumerate(groups[:-1]):
        assert {stage.rate(group.name, p) for p in group.parameters} == {0.5 ** (depth - 1 - i)}, group.name
        fitting = [g.name for g in groups for p in g.parameters if matches(re.escape(group.name), g.name, p)]
        assert set(fitting) <= {group.name}, (group.name, set(fitting))


@pytest.mark.parametrize("name", TIMM)
def test_rates_of_timm_models(name):
    with torch.device("meta"):
        exact_rates(layer_groups(timm.create_model(name, pretrained=False)))


@pytest.mark.parametrize("case", HF_CASES)
def test_rates_of_hugging_face_models(case):
    exact_rates(layer_groups(HF_CASES[case][0]()))


def test_a_stage_is_named_after_its_first_block():
    """Its downsampling is in the same group; the stage's own path would hold the later blocks too."""
    with torch.device("meta"):
        names = [g.name for g in layer_groups(timm.create_model("convnext_atto", pretrained=False))]
    assert names[:5] == ["stem", "stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]


def test_a_timm_class_built_directly():
    from timm.models.vision_transformer import VisionTransformer

    groups = layer_groups(
        VisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=2, num_heads=2, num_classes=2)
    )
    assert [g.name for g in groups] == ["stem", "blocks.0", "blocks.1", "head"]


def test_the_timm_wrapper_has_the_same_groups_as_the_model_in_it():
    wrapper = tiny_timm_resnet()
    inside = layer_groups(wrapper.timm_model)
    assert [g.name for g in layer_groups(wrapper)] == [g.name for g in inside]
    assert [tuple(n.removeprefix("timm_model.") for n in g.parameters) for g in layer_groups(wrapper)] == [
        g.parameters for g in inside
    ]


def test_adapters_are_in_their_hosts_groups():
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    groups = {g.name: g for g in layer_groups(model)}
    assert list(groups) == ["embeddings", "layer.0", "layer.1", "head"]
    assert any("layer.1" in n and "lora_B" in n for n in groups["layer.1"].parameters)
    assert any("modules_to_save" in n for n in groups["head"].parameters)
    assert not any(groups["embeddings"].requires_grad) and any(groups["layer.0"].requires_grad)


def test_rules_place_what_nothing_declares():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(UserError) as error:
        layer_groups(model)
    assert "0.weight" in str(error.value) and "layer_rules:" in str(error.value)
    groups = layer_groups(model, [("^0", "stem"), (r"^([12])\.", None), ("^3", "last"), ("^4", "head")])
    assert [g.parameters for g in groups] == [
        ("0.weight", "0.bias"),
        ("1.weight", "1.bias"),
        ("2.weight", "2.bias", "3.weight", "3.bias"),
        ("4.weight", "4.bias"),
    ]


def test_a_rule_moves_a_fresh_pooler_into_the_head():
    groups = layer_groups(tiny_bert(), [(r"^bert\.pooler\.", "head")])
    assert groups[-1].parameters == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([("^nothing", 0)], "matches no parameter"),
        ([("(", 0)], "not a regular expression"),
        ([("^bert", "top")], "unknown depth 'top'"),
        ([("^bert", None)], "captures no number"),
    ],
)
def test_wrong_rules_are_explained(rules, said):
    with pytest.raises(UserError, match=said):
        layer_groups(tiny_bert(), rules)


def test_frozen_modules_follow_what_trains():
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("classifier", "bert.encoder.layer.1", "bert.pooler")))
    frozen = {id(m) for m in frozen_modules(model, layer_groups(model))}
    state = {name: id(module) in frozen for name, module in model.named_modules()}
    assert state["bert.embeddings"] and state["bert.embeddings.dropout"]
    assert state["bert.encoder.layer.0"] and state["bert.encoder.layer.0.output.dropout"]
    assert not state["bert.encoder.layer.1.output.dropout"] and not state["bert.encoder"]
    assert not state["dropout"] and not state["classifier"] and not state[""]


def test_a_dropout_between_frozen_groups_is_frozen_though_its_parent_is_not():
    model = tiny_timm_vit(pos_drop_rate=0.5, drop_rate=0.5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("timm_model.head."))
    frozen = {id(m) for m in frozen_modules(model, layer_groups(model))}
    assert id(model.timm_model.pos_drop) in frozen
    assert id(model.timm_model.head_drop) not in frozen


def test_a_dropout_at_the_end_follows_the_last_group_before_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Dropout(0.5))
    groups = layer_groups(model, [("^0", 0), ("^1", "head")])
    model[0].requires_grad_(False)
    assert not any(m is model[2] for m in frozen_modules(model, groups))
    model[0].requires_grad_(True)
    model[1].requires_grad_(False)
    assert any(m is model[2] for m in frozen_modules(model, groups))


def test_batchnorm_without_affine_follows_its_block():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), nn.Linear(2, 2)
    )
    groups = layer_groups(model, [("^0", 0), ("^1", 1), ("^2", "head")])
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    assert any(m is model[1][1] for m in frozen_modules(model, groups))
    model[1].requires_grad_(True)
    assert not any(m is model[1][1] for m in frozen_modules(model, groups))
