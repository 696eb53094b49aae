"""Adapters on every kind of backbone: where they sit, what trains, and that what is saved is what was trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_transfer import UserError, layer_groups
from hf_transfer.adapter_files import logits_of, merge_checked, write_config
from hf_transfer.adapters import attach
from hf_transfer.config import ModelArguments
from hf_transfer.errors import WorkFailed
from hf_transfer.layers import plain_names
from hf_transfer.models import Labels, load_model
from hf_transfer.strategies import ADAPTERS, PlanArguments

from . import architectures as arch
from .helpers import PIXELS

LABELS = Labels("single_label_classification", ("a", "b", "c"))
TEXT, IMAGE = AutoModelForSequenceClassification, AutoModelForImageClassification


def timm_checkpoint(architecture, **model_args):
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=model_args)
    config.pretrained_cfg = {"input_size": [3, PIXELS, PIXELS]}
    model = transformers.TimmWrapperForImageClassification(config)
    for module in model.modules():  # statistics as pretraining leaves them, not 0 and 1
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


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


@pytest.mark.parametrize("adapter", INSIDE)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_was_trained(family, adapter, backbones, tmp_path):
    """Random head and adapter, another seed, plain libraries: the same logits, bit for bit. Merged: within rounding."""
    auto, _ = FAMILIES[family]
    _, loaded = backbones(family)
    if (family, adapter) in UNFIT:
        with pytest.raises(UserError, match=r"adapter: .* has no module in its blocks"):
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
    with pytest.raises(WorkFailed, match="do not answer as the adapter does"):
        merge_checked(model, {"pixel_values": torch.randn(2, 3, 64, 64)})
