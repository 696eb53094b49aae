"""A head on the pooled output of any layer: exact, the same when loaded again, and refused by plain transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from hf_transfer import UserError, layer_groups
from hf_transfer.features.frozen import places_of
from hf_transfer.features.pooled_layer import PooledChange, read_pooled, reads
from hf_transfer.layers.head_layers import ends_with_linear
from hf_transfer.models.heads import class_with_head
from hf_transfer.models.pooled_head import PooledLinear, PoolingSpec
from hf_transfer.models.timm_pooling import set_timm_pooling
from tests.architectures import HUGGING_FACE
from tests.helpers import PIXELS, tiny_timm_resnet, tiny_timm_vit, tiny_vit

MASK = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [1] * 7])


def build(name: str, **keys: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**(HUGGING_FACE[name] | {"num_labels": 2, "pad_token_id": 0} | keys)))
    with torch.no_grad():  # what is initialized to zeros and ones would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(pixels: int = PIXELS) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))}


def texts() -> dict[str, torch.Tensor]:
    ids = (torch.arange(21).reshape(3, 7) * 5 % 40 + 4) * MASK
    return {"input_ids": ids, "attention_mask": MASK}


def change(model: Any, inputs: dict[str, torch.Tensor], layer: str | list[str], pooling: str) -> PooledChange:
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(3)]
    groups = layer_groups(model)

    def collate(chosen: list[Any]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([row[name] for row in chosen]) for name in inputs}

    return read_pooled(model, groups, *places_of(model, groups, rows, collate), layer, pooling)


@torch.no_grad()
def output_of(model: Any, inputs: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(out))
    model(**inputs)
    hook.remove()
    return seen[0] if torch.is_tensor(seen[0]) else seen[0][0]


@torch.no_grad()
def by_hand(model: Any, pooled: torch.Tensor) -> torch.Tensor:
    last = next(module for module in model.modules() if isinstance(module, PooledLinear))
    last.standardize(pooled)
    sd = pooled.double().std(0, correction=0)
    sd = sd.clamp(min=0.1 * float(sd.median()))
    return last.output(((pooled - pooled.mean(0)) / sd).float())


IMAGES = {
    "vit": (tiny_vit, "layers.0", "vit.layers.0"),
    "timm vit": (tiny_timm_vit, "blocks.0", "timm_model.blocks.0"),
    "timm resnet": (tiny_timm_resnet, "layer2.0", "timm_model.layer2.0"),
    "resnet": (lambda: build("ResNetForImageClassification"), "stages.0.layers.0", "resnet.encoder.stages.0.layers.0"),
    "convnext": (lambda: build("ConvNextForImageClassification"), "stages.1.layers.1", "convnext.encoder.stages.1"),
}


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@pytest.mark.parametrize("family", IMAGES)
def test_logits_of_images_are_those_computed_by_hand(family: str, pooling: str, tmp_path):
    make, layer, path = IMAGES[family]
    model, inputs = make().eval(), images()
    value = output_of(model, inputs, path)
    if pooling == "cls" and value.dim() == 4:
        with pytest.raises(UserError, match="no cls token"):
            change(model, inputs, layer, pooling)
        return
    rows = value.flatten(2).mT if value.dim() == 4 else value[:, 1:]
    pooled = {"cls": value[:, 0], "mean": rows.mean(1), "max": rows.amax(1)}[pooling]
    before = sum(p.numel() for p in model.parameters())
    said = change(model, inputs, layer, pooling)
    expected = by_hand(model, pooled)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert (said.pooling, said.layer, said.is_standard) == (pooling, layer, False) and said.max_error < 1e-6
    assert (sum(p.numel() for p in model.parameters()) < before) is bool(said.dropped) or family == "convnext"

    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded = class_with_head(type(model), config).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "BertForSequenceClassification"])
def test_logits_of_texts_leave_out_padding(name: str, pooling: str):
    model, inputs = build(name), texts()
    layer, path = ("layers.1", "model.layers.1") if "Llama" in name else ("layer.2", "bert.encoder.layer.2")
    value = output_of(model, inputs, path)
    own = [v[m == 1] for v, m in zip(value, MASK, strict=True)]
    pooled = torch.stack([one.mean(0) if pooling == "mean" else one.amax(0) for one in own])
    change(model, inputs, layer, pooling)
    expected = by_hand(model, pooled)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        other = dict(inputs, input_ids=torch.where(MASK == 1, inputs["input_ids"], 17))  # another padding
        torch.testing.assert_close(model(**other).logits, expected, rtol=1e-4, atol=1e-5)
        short = {n: v[1:2, :4] for n, v in inputs.items()}
        torch.testing.assert_close(model(**short).logits, expected[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["timm resnet", "vit", "llama", "bert"])
def test_several_layers_are_read_one_after_the_other(family: str, tmp_path):
    """Each pooled as alone, standardized, and concatenated, whatever their widths; the mean leaves out padding."""
    make, layers, paths = {
        "timm resnet": (tiny_timm_resnet, ["layer2.0", "layer4.0"], ["timm_model.layer2.0", "timm_model.layer4.0"]),
        "vit": (tiny_vit, ["layers.0", "layers.1"], ["vit.layers.0", "vit.layernorm"]),
        "llama": (
            lambda: build("LlamaForSequenceClassification"),
            ["layers.0", "layers.1"],
            ["model.layers.0", "model.layers.1"],
        ),
        "bert": (
            lambda: build("BertForSequenceClassification"),
            ["layer.0", "layer.2"],
            ["bert.encoder.layer.0", "bert.encoder.layer.2"],
        ),
    }[family]
    inputs = texts() if family in ("llama", "bert") else images(64 if family == "timm resnet" else PIXELS)
    model = make().eval()
    values = [output_of(model, inputs, path) for path in paths]
    said = change(model, inputs, layers, "mean")
    if family in ("llama", "bert"):
        pooled = [torch.stack([v[m == 1].mean(0) for v, m in zip(one, MASK, strict=True)]) for one in values]
    else:
        pooled = [(one.flatten(2).mT if one.dim() == 4 else one[:, 1:]).mean(1) for one in values]
    last = next(module for module in model.modules() if isinstance(module, PooledLinear))
    assert last.parts == tuple(one.shape[1] for one in pooled)
    last.standardize(torch.cat(pooled, 1))
    sds = [one.double().std(0, correction=0) for one in pooled]
    sds = [sd.clamp(min=0.1 * float(sd.median())) for sd in sds]
    scaled = [(x - x.mean(0)) / torch.where(sd > 0, sd, 1.0) for x, sd in zip(pooled, sds, strict=True)]
    with torch.no_grad():
        expected = last.output(torch.cat(scaled, 1).float())
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert said.layers == tuple(layers) and said.layer == layers[-1] and said.max_error < 1e-6
    model(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())

    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert [one.layer for one in PoolingSpec.of(config).parts] == layers
    loaded = class_with_head(type(model), config).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        other = copy.deepcopy(model)
        model(**{name: value[:2] for name, value in inputs.items()})
        assert torch.equal(other(**inputs).logits, loaded(**inputs).logits)
    auto = transformers.AutoModelForImageClassification
    auto = transformers.AutoModelForSequenceClassification if family in ("llama", "bert") else auto
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        auto.from_pretrained(tmp_path)


def test_everything_below_trains_and_nothing_else_is_left():
    model, inputs = tiny_timm_resnet(), images()
    change(model, inputs, "layer2.0", "mean")
    groups = layer_groups(model)
    assert [group.name for group in groups] == ["stem", "layer1.0", "layer2.0", "head"]
    assert ends_with_linear(model, ["timm_model.fc.output"])
    model(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_a_copy_is_a_model_of_its_own():
    model, inputs = build("LlamaForSequenceClassification"), texts()
    change(model, inputs, "layers.0", "mean")
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        model(input_ids=inputs["input_ids"])  # without a mask
        assert torch.equal(other(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("name", "inputs", "layer", "why"),
    [
        ("Dinov2ForImageClassification", images(32), "layer.1", "cannot read mean of layer.1"),
        ("AlbertForSequenceClassification", texts(), "albert_layers.0", "is called 3 times"),
        ("RobertaForSequenceClassification", texts(), "layer.1", "not one linear layer but classifier.dense"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(name, inputs, layer, why):
    model = build(name)
    with torch.no_grad():
        before = model(**inputs).logits
    with pytest.raises(UserError, match=why):
        change(model, inputs, layer, "mean")
    assert PoolingSpec.of(model.config) is None
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_what_is_read_already_is_seen():
    cases = ((tiny_vit(), "layers.1", "cls", PIXELS), (tiny_timm_resnet(), "layer4.0", "mean", 64))
    for model, layer, own, pixels in cases:
        rows = [{"pixel_values": row} for row in images(pixels)["pixel_values"]]
        found = places_of(
            model.eval(),
            layer_groups(model),
            rows,
            lambda r: {"pixel_values": torch.stack([x["pixel_values"] for x in r])},
        )
        assert reads(model, *found, layer, own)
        assert not reads(model, *found, layer, "max")


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(("make", "path"), [(tiny_timm_vit, "norm"), (tiny_timm_resnet, "layer4")])
def test_timm_pools_its_last_layer_so_that_transformers_builds_the_same(make, path, pooling, tmp_path):
    model, inputs = make().eval(), images(64 if path == "layer4" else PIXELS)
    value = output_of(model, inputs, f"timm_model.{path}")
    rows = value.flatten(2).mT if value.dim() == 4 else value[:, 1:]
    assert set_timm_pooling(model, pooling)
    head = model.timm_model.get_classifier()
    with torch.no_grad():
        expected = head(rows.mean(1) if pooling == "mean" else rows.amax(1))
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not set_timm_pooling(tiny_timm_resnet(), "cls") and not set_timm_pooling(tiny_vit(), "mean")
