"""Another image size: the library's own answers, which load in plain transformers; what cannot work is refused."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
import transformers
from timm.layers import resample_abs_pos_embed
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.labels import SINGLE_LABEL, Labels
from hf_transfer.models.image_processors import complete_timm_config
from hf_transfer.models.image_size import own_size, resampled, with_image_size
from hf_transfer.tasks.image_classification import ImageClassification
from tests.architectures import HUGGING_FACE
from tests.helpers import tiny_vit

CLASSES = ("a", "b", "c", "d")
BUILD = AutoModelForImageClassification.from_config
# Sizes that an architecture refuses: its attention has a table per resolution, or it reads patches instead of images.
REFUSED = {"LevitForImageClassification": "Sizes that work: 64", "Siglip2ForImageClassification": "Remove image_size"}
# Of every way in which the size enters an architecture, the others are slow.
QUICK = ("ViT", "DeiT", "Beit", "Dinov2", "IJepa", "Swinv2", "ConvNext", "Levit", "Pvt", "Hiera", "CLIP", "Siglip2")
IMAGE_MODELS = [
    pytest.param(name, marks=() if name.removesuffix("ForImageClassification") in QUICK else pytest.mark.slow)
    for name in HUGGING_FACE
    if name.endswith("ImageClassification")
]


def saved(model, folder, size=32):
    model.config.id2label = dict(enumerate(CLASSES))
    model.config.label2id = {c: i for i, c in enumerate(CLASSES)}
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


def loaded(folder, size):
    args = ModelArguments(model_name_or_path=folder)
    return ImageClassification().load(args, DataArguments(image_size=size), Labels(SINGLE_LABEL, CLASSES))


def hugging_face(name):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(num_labels=4, **HUGGING_FACE[name])).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "position" in parameter_name:  # else zeros or nearly so, and no interpolation would be seen
                parameter.normal_()
    return model


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_hugging_face_architecture(name, tmp_path):
    """Trained at 96 pixels, it answers as its own interpolation does, and as plain transformers after saving."""
    model = hugging_face(name)
    folder = saved(model, tmp_path / "m")
    if name in REFUSED:
        with pytest.raises(UserError, match=f"image_size: 96 is not possible for a .* model. {REFUSED[name]}"):
            loaded(folder, 96)
        return
    result, processor = loaded(folder, 96)
    assert result.fresh == ()
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        logits = result.model.eval()(pixels).logits
        result.model.save_pretrained(tmp_path / "again")
        processor.save_pretrained(tmp_path / "again")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(again(pixels).logits, logits)
        try:
            own = model(pixels, interpolate_pos_encoding=True).logits
        except (TypeError, RuntimeError):  # the class does not interpolate
            return
    given = AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert (given.size["height"], given.size["width"]) == (96, 96)
    torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "architecture",
    ["levit_128s", *(pytest.param(a, marks=pytest.mark.slow) for a in ("mixer_s32_224", "gmlp_ti16_224"))],
)
def test_timm_models_with_a_table_per_resolution_name_their_own_size(architecture):
    config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=2)
    complete_timm_config(config)
    with pytest.raises(UserError, match=f"image_size: 96 is not possible for {architecture}. Sizes that work: 224.$"):
        with_image_size(config, 96, BUILD)


def test_the_size_is_that_of_the_configuration_from_the_start():
    """SwinV2 shifts its windows only where the image is larger than a window: it must be built for its size."""
    config = transformers.Swinv2Config(
        embed_dim=8, depths=[2], num_heads=[2], image_size=32, patch_size=4, window_size=8
    )
    config.architectures = ["Swinv2ForImageClassification"]
    larger = with_image_size(config, 64, BUILD)
    assert (config.image_size, larger.image_size) == (32, 64)
    assert [b.shift_size for b in BUILD(config).swinv2.encoder.layers[0].blocks] == [0, 0]
    assert [b.shift_size for b in BUILD(larger).swinv2.encoder.layers[0].blocks] == [0, 4]


def test_sizes_that_leave_out_pixels_are_refused(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, image_size=28, patch_size=14
    )
    config.architectures = ["ViTForImageClassification"]
    with pytest.raises(UserError, match=r"100 is not possible for a vit model. Sizes that work: 28, 98, 112\."):
        with_image_size(config, 100, BUILD)


SMALL = dict(embed_dim=16, depth=1, num_heads=2)
# name → (its arguments, what becomes of them at 96 pixels; sizes that work where it is refused)
TIMM = {
    "resnet10t": ({}, {}),
    "xcit_nano_12_p16_224": (SMALL, {}),
    "vit_tiny_patch16_224": (SMALL, {"dynamic_img_size": True}),
    "swin_tiny_patch4_window7_224": (dict(embed_dim=8, depths=[1, 1, 2, 1]), {"dynamic_img_size": True}),
    "coat_tiny": (dict(serial_depths=[1, 1, 1, 1]), {"img_size": 96}),
    "pit_ti_distilled_224": ({}, {"img_size": 96}),
    "beit_base_patch16_224": (SMALL, {"img_size": 96}),
    "hiera_tiny_224": ({}, {"img_size": 96}),
    "nest_tiny": ({}, {"img_size": 96}),
    "levit_128s": ({}, "224"),
    "mixer_s32_224": ({}, "224"),
    "eva02_tiny_patch14_224": (SMALL, "84, 98, 224"),
}


@pytest.mark.parametrize("name", TIMM)
def test_every_kind_of_timm_architecture(name):
    given, expected = TIMM[name]
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=4, model_args=given or None)
    cfg = timm.get_pretrained_cfg(name).to_dict()
    config.pretrained_cfg = {k: v for k, v in cfg.items() if k != "num_classes"}
    if isinstance(expected, str):
        with pytest.raises(
            UserError, match=rf"image_size: 96 is not possible for {name}. Sizes that work: {expected}\."
        ):
            with_image_size(config, 96, BUILD)
        return
    changed = with_image_size(config, 96, BUILD)
    assert (changed.model_args or {}) == given | expected
    assert own_size(changed) == 96 and own_size(config) == cfg["input_size"][1]


def test_a_timm_model_with_interpolated_positions(tmp_path):
    """What is saved has the tables of its own size; plain transformers answers the same."""
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture="cait_xxs24_224", num_labels=4)
    config.model_args = dict(depth=1, embed_dim=16, num_heads=2)
    folder = saved(transformers.TimmWrapperForImageClassification(config), tmp_path / "m")
    result, _ = loaded(folder, 96)
    assert result.fresh == () and result.model.config.model_args["img_size"] == 96
    own = AutoModelForImageClassification.from_pretrained(folder).timm_model.pos_embed
    expected = resample_abs_pos_embed(own, [6, 6], num_prefix_tokens=0)
    torch.testing.assert_close(result.model.timm_model.pos_embed, expected, atol=1e-6, rtol=1e-6)
    result.model.save_pretrained(tmp_path / "again")
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(again(pixels).logits, result.model.eval()(pixels).logits)
    assert AutoImageProcessor.from_pretrained(tmp_path / "again").data_config["input_size"] == (3, 96, 96)


def test_an_adapter_keeps_its_size_on_a_backbone_of_another(tmp_path):
    """Its folder holds no positions: they are interpolated from the backbone's, as before training."""
    from hf_transfer import Predictor, fine_tune

    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = saved(tiny_vit(), tmp_path / "m")
    keys = dict(max_train_samples=12, max_eval_samples=12, max_predict_samples=6, num_train_epochs=1)
    run = fine_tune(
        folder,
        "bundled:digits",
        output_dir=str(tmp_path / "o"),
        image_size=64,
        adapter="lora",
        save_strategy="no",
        **keys,
    )
    again = Predictor.load(run.output_dir)
    assert again.model.config.image_size == 64 and again.evaluate()["metrics"] == pytest.approx(run.metrics)


@pytest.mark.parametrize(
    ("name", "before", "shape"),
    [
        ("embeddings.position_embeddings", (1, 17, 8), (1, 26, 8)),
        ("position_embedding.weight", (16, 8), (25, 8)),
        ("attn.relative_position_bias_table", (52, 2), (84, 2)),
        ("timm_model.pos_embed", (1, 8, 4, 4), (1, 8, 5, 5)),
        ("timm_model.pos_embed", (1, 4, 4, 8), (1, 5, 5, 8)),
        ("timm_model.pos_embed", (1, 4, 16, 8), (1, 4, 25, 8)),
    ],
)
def test_tables_of_positions(name, before, shape):
    """A constant stays one under interpolation; what precedes or follows the grid is kept."""
    assert resampled(name, torch.full(before, 3.0), shape).shape == shape
    torch.testing.assert_close(resampled(name, torch.full(before, 3.0), shape), torch.full(shape, 3.0))


@pytest.mark.parametrize(
    ("name", "before", "shape"),
    [
        ("attention_biases", (4, 196), (4, 36)),
        ("pos_embed", (1, 17, 8), (1, 27, 8)),
        ("pos_embed", (1, 17, 8), (1, 26, 4)),
        ("pos_embed", (1, 17, 8), (26, 8)),
        ("relative_position_bias_table", (52, 2), (64, 2)),
    ],
)
def test_what_is_no_table_of_another_grid(name, before, shape):
    assert resampled(name, torch.zeros(before), shape) is None
