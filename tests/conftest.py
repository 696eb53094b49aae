"""Models in folders, as users have them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datasets.arrow_dataset import Column
from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_transfer.models import bundled as bundled_models
from tests import warm
from tests.helpers import PIXELS, tiny_bert, tiny_vit


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power: what is written outlives any process without being synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def _columns_are_read_at_once() -> Iterator[None]:
    """`datasets` stratifies by an array of the labels, for which numpy asks a column for one row after the other: a
    second for bundled:rotten-tomatoes, in each of a run's five splits. A slice has the same values."""

    def array(column: Column, *_: Any, **__: Any) -> np.ndarray:
        return np.asarray(column[:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Column, "__array__", array, raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What the files before have imported is not looked through again at each training."""
    warm.settle()


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory) -> str:
    """A random BERT of two layers that reads 16 tokens of the real vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    tokenizer = AutoTokenizer.from_pretrained(bundled_models.model_path("bundled:minilm-l6"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    tiny_bert(vocab_size=tokenizer.vocab_size).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_vit_folder(tmp_path_factory) -> str:
    """A random ViT of two layers for pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    tiny_vit().save_pretrained(folder)
    ViTImageProcessor(size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gray_vit_folder(tmp_path_factory) -> str:
    """The same for grey pictures, with the processor's usual three means."""
    folder = tmp_path_factory.mktemp("models") / "gray"
    config = ViTConfig(
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=2,
        image_size=PIXELS,
        patch_size=16,
        num_channels=1,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder)
    return str(folder)
