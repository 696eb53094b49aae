"""Adapters on every kind of backbone: where they sit, what trains, and that what is saved is what was trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_transfer import TransferArguments, UserError, layer_groups, make_plan
from hf_transfer.adapters.attach import attach
from hf_transfer.adapters.files import check_reload, logits_of, merge_checked, write_config
from hf_transfer.config.arguments.adapter import ADAPTERS
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.data.labels import Labels
from hf_transfer.errors import WorkFailed
from hf_transfer.layers.frozen import frozen_modules
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.models.load import load_model
from tests import architectures as arch
from tests.helpers import PIXELS, tiny_bert, tiny_timm_resnet, tiny_timm_vit, with_statistics

LABELS = Labels("single_label_classification", ("a", "b", "c"))
TEXT, IMAGE = AutoModelForSequenceClassification, AutoModelForImageClassification


def timm_checkpoint(architecture, **model_args):
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=model_args)
    config.pretrained_cfg = {"input_size": [3, PIXELS, PIXELS]}
    return with_statistics(transformers.TimmWrapperForImageClassification(config))


def masked_language_model():
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**arch.ENCODER, max_position_embeddings=40))


# A pretrained checkpoint of each family; none has the head, and BERT's has no pooler either.
FAMILIES = {
    "bert": (TEXT, masked_language_model),
    "roberta": (TEXT, lambda: arch.hugging_face("RobertaForSequenceClassification")),
    "gpt2": (TEXT, lambda: arch.hugging_face("GPT2ForSequenceClassification")),
    "qwen2": (TEXT, lambda: arch.hugging_face("Qwen2ForSequenceClassification")),
    "vit": (IMAGE, lambda: arch.hugging_face("ViTForImageClassification")),
    "convnext": (IMAGE, lambda: arch.hugging_face("ConvNextForImageClassification")),
    "resnet": (IMAGE, lambda: arch.hugging_face("ResNetForImageClassification")),
    "timm_vit": (IMAGE, lambda: timm_checkpoint("test_vit", img_size=PIXELS)),
    "timm_resnet": (IMAGE, lambda: timm_checkpoint("test_resnet")),
    "timm_efficientnet": (IMAGE, lambda: timm_checkpoint("test_efficientnet")),
}
INSIDE = [a for a in ADAPTERS if a not in ("none", "prompt", "prefix")]
# No linear layer, or no norm of that kind, to adapt.
UNFIT = {
    *((f, a) for f in ("resnet", "timm_resnet", "timm_efficientnet") for a in ("adalora", "vera")),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """family -> (the checkpoint's folder, what is loaded from it for three labels)."""
    made = {}

    def backbone(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "base"
            FAMILIES[family][1]().save_pretrained(folder)
            made[family] = folder, load(family, folder)
        return made[family]

    return backbone


def load(family, folder, labels=LABELS, **keys):
    torch.manual_seed(1)
    auto, _ = FAMILIES[family]
    return load_model(ModelArguments(str(folder), **keys), auto, AutoConfig.from_pretrained(folder), labels)


def adapted(loaded, adapter, **keys):
    torch.manual_seed(1)
    return attach(copy.deepcopy(loaded.model), PlanArguments(adapter=adapter, **keys), loaded.layer_rules)


def randomise(model):
    """Everything that trains, so that nothing agrees because it is still at its beginning."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * (0.05 if p.ndim > 1 else 0.3))
                assert p.abs().sum() > 0, name


def batch_of(model):
    torch.manual_seed(2)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if core.config.model_type == "timm_wrapper":
        return {"pixel_values": torch.randn(3, 3, PIXELS, PIXELS)}
    batch = arch.inputs_of(core)
    return batch | ({"attention_mask": torch.ones_like(batch["input_ids"])} if "input_ids" in batch else {})


def plain_reload(auto, folder):
    """As a stranger would, without a line of this package."""
    torch.manual_seed(77)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = auto.from_pretrained(base, config=AutoConfig.from_pretrained(folder), ignore_mismatched_sizes=True)
    for p in model.parameters():
        p.data = p.data.clone()
    return PeftModel.from_pretrained(model, folder)


MERGEABLE = [a for a in INSIDE if a != "bottleneck"]
FROM_ZERO = [a for a in INSIDE if a not in ("adalora", "vera")]  # whose updates begin small, not at zero


# Each adapter on one family of texts and one of images, each family with two adapters, and what has no place; the rest
# of the table is slow.
QUICK = {
    *(("bert", a) for a in INSIDE),
    *(("timm_resnet", a) for a in INSIDE),
    *((f, a) for f in FAMILIES for a in ("lora", "ln_tuning")),
    *UNFIT,
}
PAIRS = [
    pytest.param(f, a, marks=() if (f, a) in QUICK else pytest.mark.slow, id=f"{f}-{a}")
    for f in FAMILIES
    for a in INSIDE
]


@pytest.mark.parametrize(("family", "adapter"), PAIRS)
def test_what_is_saved_is_what_was_trained(family, adapter, backbones, tmp_path):
    """Random head and adapter, another seed, plain libraries: the same logits, bit for bit. Merged: within rounding."""
    auto, _ = FAMILIES[family]
    _, loaded = backbones(family)
    if (family, adapter) in UNFIT:
        with pytest.raises(UserError, match=r"adapter: the blocks of .* have no module"):
            adapted(loaded, adapter)
        return
    model = adapted(loaded, adapter)
    batch = batch_of(model)
    before = logits_of(loaded.model, batch)
    if adapter in FROM_ZERO:
        assert torch.allclose(logits_of(model, batch), before, atol=1e-5), (
            "training starts from the pretrained function"
        )

    trains = {plain_names(model)[n] for n, p in model.named_parameters() if p.requires_grad}
    own = {n for n, _ in loaded.model.named_parameters()}
    groups = layer_groups(model, loaded.layer_rules)
    head = {plain_names(model)[n] for n in groups[-1].parameters}
    assert head >= set(loaded.fresh) and head <= trains, "the head and what the checkpoint lacks are trained"
    if adapter != "ln_tuning":
        assert trains & own == head, "nothing else of the backbone is"
    assert [g.name for g in groups] == [g.name for g in layer_groups(loaded.model, loaded.layer_rules)]

    randomise(model)
    model.save_pretrained(tmp_path)
    write_config(model, tmp_path)
    again = plain_reload(auto, tmp_path)
    ours, theirs = logits_of(model, batch), logits_of(again, batch)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"} and again.config.architectures

    if adapter in MERGEABLE:
        merged = merge_checked(model, batch)
        assert not isinstance(merged, PeftModel) and set(merged.state_dict()) == set(loaded.model.state_dict())
        assert torch.equal(logits_of(model, batch), ours), "the adapter stays as it was"
    else:
        with pytest.raises(UserError, match="cannot be merged"):
            merge_checked(model, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_load_with_plain_transformers(family, backbones, tmp_path):
    model = adapted(backbones(family)[1], "lora")
    randomise(model)
    batch = batch_of(model)
    merge_checked(model, batch).save_pretrained(tmp_path)
    again = FAMILIES[family][0].from_pretrained(tmp_path)
    assert not isinstance(again, PeftModel) and again.config.id2label[2] == "c"
    assert torch.allclose(logits_of(again, batch), logits_of(model, batch), atol=1e-4)


def test_weights_that_a_layer_changes_at_each_use_are_not_merged_in_silence():
    """timm's standardised convolutions normalise their weight: a merged update would be normalised too."""
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture="test_nfnet", num_labels=3)
    model = attach(transformers.TimmWrapperForImageClassification(config), PlanArguments(adapter="lora"))
    randomise(model)
    with pytest.raises(WorkFailed, match="gives different logits than the adapter"):
        merge_checked(model, {"pixel_values": torch.randn(2, 3, 64, 64)})


# ---- prompts -------------------------------------------------------------------------------------------------------


def peft_can_prefix_tune(model):
    """Tried with peft alone: its releases and those of transformers do not always agree on how a cache is passed."""
    model = get_peft_model(copy.deepcopy(model), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    try:
        model(**batch_of(model))
    except (TypeError, ValueError, AttributeError):
        return False
    return True


@pytest.mark.parametrize(("family", "adapter"), [("bert", "prompt"), ("gpt2", "prefix"), ("qwen2", "prefix")])
def test_prompts_are_saved_with_the_head(family, adapter, backbones, tmp_path):
    loaded = backbones(family)[1]
    if adapter == "prefix" and not peft_can_prefix_tune(loaded.model):
        with pytest.raises(UserError, match=r"adapter: .* does not support prefix: peft [\d.]+ .*\. Use lora, ia3 or"):
            adapted(loaded, adapter)
        return
    model = adapted(loaded, adapter)
    groups = {g.name: g for g in layer_groups(model, loaded.layer_rules)}
    assert any("prompt_encoder" in n for n in groups["embeddings"].parameters)
    assert {plain_names(model)[n] for n in groups["head"].parameters} >= set(loaded.fresh)
    randomise(model)
    model.save_pretrained(tmp_path)
    write_config(model, tmp_path)
    batch = batch_of(model)
    assert torch.equal(logits_of(model, batch), logits_of(plain_reload(TEXT, tmp_path), batch))
    with pytest.raises(UserError, match="cannot be merged"):
        merge_checked(model, batch)


@pytest.mark.parametrize(
    ("family", "adapter", "reason"),
    [("gpt2", "prompt", "logits depend on padding"), ("vit", "prompt", ""), ("timm_vit", "prefix", "")],
)
def test_a_model_that_takes_no_prompt_is_refused(family, adapter, reason, backbones):
    with pytest.raises(UserError, match=f"adapter: .*{adapter}.*{reason}"):
        adapted(backbones(family)[1], adapter)


# ---- where adapters go ---------------------------------------------------------------------------------------------


def ends(model, adapter="lora", **keys):
    model = attach(model, PlanArguments(adapter=adapter, **keys))
    return {n.rpartition(".")[2] for n in model.base_model.targeted_module_names}


def test_targets_are_the_layers_of_the_blocks():
    """By type and by use: no stem, no head, no depthwise convolution, no layer whose weight is read directly."""
    assert ends(tiny_bert()) == {"query", "key", "value", "dense"}
    assert ends(arch.hugging_face("ViTForImageClassification")) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "fc1",
        "fc2",
    }
    assert ends(arch.hugging_face("GPT2ForSequenceClassification")) == {"c_attn", "c_proj", "c_fc"}
    assert ends(tiny_timm_vit()) == {"qkv", "proj", "fc1", "fc2"}
    assert ends(tiny_timm_resnet()) == {"conv1", "conv2", "1"}  # "1" is the convolution of a shortcut
    efficientnet = timm_checkpoint("test_efficientnet")
    assert "conv_dw" not in ends(efficientnet)
    found = ends(timm_checkpoint("test_vit", img_size=PIXELS), "ln_tuning")
    assert found == {"norm1", "norm2", "norm"}
    model = timm_checkpoint("beit_base_patch16_224", img_size=PIXELS, embed_dim=12, depth=2, num_heads=2)
    assert ends(copy.deepcopy(model)) == {"proj", "fc1", "fc2"}, "timm's BEiT reads the weight of qkv itself"
    with pytest.raises(UserError, match=r"the forward pass does not call .*qkv"):
        ends(model, lora_target_modules=["qkv"])


def test_named_targets():
    assert ends(tiny_bert(), lora_target_modules=["query"]) == {"query"}
    model = attach(
        tiny_bert(), PlanArguments(adapter="lora", lora_target_modules=[r"bert\.encoder\.layer\.1\..*dense"])
    )
    hosts = model.base_model.targeted_module_names
    assert len(hosts) == 3 and all(".layer.1." in n for n in hosts)
    with pytest.raises(UserError) as error:
        attach(tiny_bert(), PlanArguments(adapter="lora", lora_target_modules=["qkv"]))
    assert "lora_target_modules: 'qkv' matches no module" in str(error.value)
    assert "query, key, value, dense" in str(error.value)
    with pytest.raises(UserError, match="have no module that VERA can adapt"):
        attach(tiny_timm_resnet(), PlanArguments(adapter="vera"))


def test_any_configuration_of_peft():
    model = attach(tiny_bert(), PlanArguments(adapter={"peft_type": "loha", "r": 3}))
    assert any("hada_w1_a" in n for n, _ in model.named_parameters())
    saved = model.active_peft_config.modules_to_save
    assert "classifier" in saved
    with pytest.raises(UserError, match=r"LORA has no key 'rank'"):
        attach(tiny_bert(), PlanArguments(adapter={"peft_type": "LORA", "rank": 3}))
    with pytest.raises(UserError, match=r"no peft_type 'LORAA'.*Did you mean 'LORA'"):
        attach(tiny_bert(), PlanArguments(adapter={"peft_type": "LORAA"}))
    model = attach(tiny_bert(), PlanArguments(adapter={"peft_type": "LORA", "modules_to_save": ["bert.embeddings"]}))
    groups = {g.name: g for g in layer_groups(model)}
    assert any(groups["embeddings"].requires_grad), "base weights that are asked for are trained"


def test_base_weights_that_no_file_would_hold_are_refused():
    model = attach(tiny_bert(), PlanArguments(adapter="lora"))
    model.get_base_model().bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"bert\.embeddings\.word_embeddings\.weight and 0 more .* would not be saved"):
        attach(model, PlanArguments())
    kept = attach(tiny_bert(), PlanArguments(adapter={"peft_type": "LORA", "bias": "all"}))  # peft saves these
    assert any(n.endswith("LayerNorm.bias") and p.requires_grad for n, p in kept.named_parameters())


def test_bottlenecks_sit_behind_the_sub_layers():
    """Houlsby: behind attention and feed-forward; Pfeiffer: behind the feed-forward layer of each block."""

    def hosts(model, placement):
        keys = PlanArguments(adapter={"peft_type": "BOTTLENECK", "placement": placement, "reduction_factor": 2})
        return list(attach(model, keys).base_model.targeted_module_names)

    assert hosts(tiny_bert(layers=1), "houlsby") == [
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.output.dense",
    ]
    assert hosts(tiny_bert(layers=1), "pfeiffer") == ["bert.encoder.layer.0.output.dense"]
    assert hosts(tiny_timm_vit(), "houlsby") == [
        f"timm_model.blocks.{i}.{end}" for i in (0, 1) for end in ("attn.proj", "mlp.fc2")
    ]
    llama = arch.hugging_face("LlamaForSequenceClassification")
    assert {n.rpartition(".")[2] for n in hosts(llama, "houlsby")} == {"o_proj", "down_proj"}
    model = attach(tiny_bert(), PlanArguments(adapter={"peft_type": "BOTTLENECK", "reduction_factor": 2}))
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters() if "layer.0" in n and "bottleneck_" in n}
    assert sorted(sizes.values()) == [(4,), (4, 8), (8,), (8, 4)]
    with pytest.raises(UserError, match=r"placement 'pfeifer' .*Did you mean 'pfeiffer'"):
        hosts(tiny_bert(), "pfeifer")


def test_what_the_caller_froze_stays_frozen():
    model = tiny_bert()
    model.classifier.bias.requires_grad_(False)
    model = attach(model, PlanArguments(adapter="lora"))
    free = {plain_names(model)[n] for n, p in model.named_parameters() if p.requires_grad}
    assert "classifier.weight" in free and "classifier.bias" not in free


# ---- the plan over adapters ----------------------------------------------------------------------------------------


class Keys(PlanArguments):
    peak_learning_rate, num_train_epochs = 1.0, 4.0


def test_rates_by_depth_and_unfreezing_over_adapters():
    """The same groups and rates as without; LoRA+ multiplies lora_B's own, whatever rule gave it."""
    keys = Keys(adapter="lora", strategy="gradual", layer_lr_decay=0.5, lora_plus_ratio=16, stage_lr_decay=0.1)
    groups = layer_groups(attach(tiny_bert(layers=3), keys))
    plan = make_plan(keys, groups)
    assert [g.name for g in groups] == [g.name for g in layer_groups(tiny_bert(layers=3))]
    moved = [s for s in plan.stages if s.name == "top 2 groups"]
    rates = {
        n: moved[0].rate(g.name, n)
        for g in groups
        for n, free in zip(g.parameters, g.requires_grad, strict=True)
        if free
    }
    expected = {"layer.0": 0.0, "layer.1": 0.5e-2, "layer.2": 1e-2}
    for group, rate in expected.items():
        of = {n: r for n, r in rates.items() if f".{group}." in n}
        for part, factor in (("lora_A", 1), ("lora_B", 16)):
            found = [r for n, r in of.items() if part in n]
            assert found and found == pytest.approx([factor * rate] * len(found))
    assert [r for n, r in rates.items() if "classifier" in n] == pytest.approx([1e-2] * 2)
    fixed = Keys(adapter="lora", strategy="full", lora_plus_ratio=16, layer_learning_rates={"layer.1": 0.3})
    (stage,) = make_plan(fixed, groups).stages
    assert {stage.rate("layer.1", n) for n in rates if ".layer.1." in n} == {0.3}, "a written rate is the rate"


def test_what_trains_under_an_adapter_by_strategy():
    def stages(**given):
        keys = Keys(**given)
        return [s.trainable for s in make_plan(keys, layer_groups(attach(tiny_bert(), keys))).stages]

    assert stages(strategy="auto", adapter="lora") == [("layer.0", "layer.1", "head")]
    assert stages(strategy="partial", unfrozen_groups=1, adapter="ia3") == [("layer.1", "head")]
    assert stages(strategy="two-phase", adapter="lora")[0] == ("head",)
    assert stages(strategy="full", adapter="lora", freeze=["layer.0"]) == [("layer.1", "head")]
    assert make_plan(Keys(strategy="auto", adapter="lora"), layer_groups(tiny_bert())).strategy == "full"


def test_normalisation_with_statistics_stays_in_eval():
    for adapter in ("lora", "ln_tuning", "ia3"):
        model = attach(tiny_timm_resnet(), PlanArguments(adapter=adapter)).train()
        for module in frozen_modules(model, layer_groups(model)):
            module.training = False
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and not any(m.training for m in norms)
        assert model.training
        before = {n: b.clone() for n, b in model.named_buffers()}
        model(pixel_values=torch.randn(4, 3, PIXELS, PIXELS))
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"adapter": "lroa"}, "adapter: 'lroa' is neither one of none, lora, .* Did you mean 'lora'"),
        ({"adapter": {"r": 3}}, "does not say its peft_type"),
        ({"adapter": "ia3", "lora_r": 4}, "lora_r: 4 has no effect with adapter: ia3"),
        ({"lora_plus_ratio": 4.0}, "lora_plus_ratio: 4.0 has no effect with adapter: none"),
        ({"adapter": "lora", "lora_r": 0}, "lora_r: expected a positive number, got 0"),
        ({"adapter": "lora", "lora_dropout": 1.0}, "lora_dropout: expected a number at least 0 and below 1, got 1"),
        ({"adapter": "lora", "strategy": "scratch"}, "strategy: scratch has none"),
    ],
)
def test_wrong_keys(keys, said, tmp_path):
    with pytest.raises(UserError, match=said):
        TransferArguments(str(tmp_path), **keys)


def test_every_named_adapter_is_one():
    for name in ADAPTERS:
        if name not in ("none", "prefix"):
            assert attach(arch.hugging_face("BertForSequenceClassification"), PlanArguments(adapter=name)).peft_config


def test_saved_weights_that_differ_are_seen(backbones, tmp_path):
    model = adapted(backbones("bert")[1], "lora")
    model.save_pretrained(tmp_path)
    write_config(model, tmp_path)
    with torch.no_grad():
        dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.bias"].add_(1)
    with pytest.raises(WorkFailed, match=r"gives different logits than the trained one.*classifier\.bias"):
        check_reload(model, load("bert", tmp_path).model, batch_of(model), tmp_path)
