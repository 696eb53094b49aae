"""Channels: what is saved says how its images are preprocessed, and what cannot be given is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as Pixels
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_transfer import UserError
from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.data.augment import EXAMPLE, Chance
from hf_transfer.data.labels import SINGLE_LABEL, Labels
from hf_transfer.tasks.image_classification import ImageClassification

LABELS = Labels(SINGLE_LABEL, ("a", "b"))
PICTURE = Pixels.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64))


def timm_folder(folder, architecture="test_efficientnet", **config):
    torch.manual_seed(0)
    made = transformers.TimmWrapperConfig(architecture=architecture, num_labels=2, **config)
    transformers.TimmWrapperForImageClassification(made).save_pretrained(folder)
    return str(folder)


def load(folder, **keys):
    loaded, processor = ImageClassification().load(
        ModelArguments(model_name_or_path=folder), DataArguments(**keys), LABELS
    )
    return loaded.model.eval(), processor


@pytest.mark.parametrize("keys", [{}, {"image_size": 64}])
@pytest.mark.parametrize("config", [{}, {"model_args": {"in_chans": 1}}])
def test_what_is_saved_of_a_timm_model_reads_in_plain_transformers(config, keys, tmp_path):
    """Also a model of a bare architecture, whose configuration says nothing of preprocessing."""
    model, processor = load(timm_folder(tmp_path / "m", **config), **keys)
    model.save_pretrained(tmp_path / "saved")
    picture = PICTURE if config else PICTURE.convert("RGB")
    pixels = ImageClassification().encode([[PICTURE]], processor)["pixel_values"]
    plain = AutoImageProcessor.from_pretrained(tmp_path / "saved")(picture)["pixel_values"]
    size = keys.get("image_size", 160)
    assert pixels.shape == (1, 1 if config else 3, size, size) and torch.equal(plain, pixels)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(plain).logits, model(pixels).logits)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("augmentation", ["strong", pytest.param("trivialaugment", marks=pytest.mark.slow)])
def test_gray_timm_models_train_on_one_channel(architecture, augmentation, tmp_path):
    """With another size and every augmentation; color images become gray."""
    folder, task = timm_folder(tmp_path, architecture, model_args={"in_chans": 1}), ImageClassification()
    keys = DataArguments(image_size=64, augmentation=augmentation)
    loaded, processor = task.load(ModelArguments(model_name_or_path=folder), keys, LABELS)
    change = task.change(("image",), processor, keys, Chance(0, None))
    pixels = change({"image": [PICTURE, PICTURE.convert("RGB")], "labels": [0, 1], EXAMPLE: [0, 0]})["pixel_values"]
    pixels = torch.stack(list(pixels))
    assert pixels.shape == (2, 1, 64, 64) and torch.equal(pixels[0], pixels[1])
    assert loaded.model(pixels).logits.shape == (2, 2)


def test_a_gray_model_of_transformers(gray_vit_folder, tmp_path):
    model, processor = load(gray_vit_folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    plain = AutoImageProcessor.from_pretrained(tmp_path)([PICTURE], return_tensors="pt")["pixel_values"]
    ours = ImageClassification().encode([[PICTURE.convert("RGB")]], processor)["pixel_values"]
    assert ours.shape[1] == 1 and torch.equal(plain, ours)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("library", ["timm", "transformers", "clip"])
def test_other_numbers_of_channels_are_refused(library, channels, tmp_path):
    small = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, image_size=32)
    if library == "timm":
        timm_folder(tmp_path, model_args={"in_chans": channels})
    elif library == "clip":
        vision = dict(small, num_channels=channels)
        transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=vision)).save_pretrained(tmp_path)
    else:
        transformers.ViTForImageClassification(transformers.ViTConfig(**small, num_channels=channels)).save_pretrained(
            tmp_path
        )
    with pytest.raises(UserError, match=rf"model_name_or_path: .* reads images of {channels} channels"):
        load(str(tmp_path))


def test_a_processor_that_only_gives_rgb(tmp_path):
    config = transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    transformers.MobileViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"reads images of 1 channel, and MobileViTImageProcessor .*does not give them"):
        load(str(tmp_path))
