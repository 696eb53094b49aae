"""Models in folders, as users have them; and what makes the tests quicker without a change of what they see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
from datasets import DatasetDict
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_transfer.data import bundled
from hf_transfer.runs import run
from tests import warm
from tests.helpers import PIXELS, TOKENS, small_tokenizer, tiny_bert, tiny_vit

warm.hasten()


@pytest.fixture(scope="session", autouse=True)
def _bundled_data_is_read_once() -> Iterator[None]:
    """Each run has its own copy of the splits, whose content nothing can change."""

    def copied(once: Callable[[], DatasetDict]) -> DatasetDict:
        return DatasetDict({name: copy.copy(split) for name, split in once().items()})

    with pytest.MonkeyPatch.context() as patch:
        for name, load in list(bundled.DATASETS.items()):
            patch.setitem(bundled.DATASETS, name, partial(copied, cache(load)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _labels_are_not_judged() -> Iterator[None]:
    """Runs write no `label_issues.csv`, which takes a third of a second in each; `runs/test_label_issues.py` lets them.

    With and without it a run is the same, bit for bit, which is tested there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_label_issues", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_reports() -> Iterator[None]:
    """Runs write no `report.html`, which takes a second in each; `report/test_report.py` lets them.

    It is written when all else is done, from the files that are there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What the files before have imported is not looked through again at each training."""
    warm.settle()


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory) -> str:
    """A random BERT of two layers that reads 16 tokens of the real vocabulary: characters and the commonest words."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    small_tokenizer(16).save_pretrained(folder)
    tiny_bert(vocab_size=TOKENS).save_pretrained(folder)
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
