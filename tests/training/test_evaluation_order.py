"""Evaluation in windows sorted by length: what the model sees, and what callers get."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from transformers import Trainer, TrainingArguments

from hf_transfer import TransferTrainer
from tests.helpers import arguments, pad, ragged_texts, tiny_bert


class Seen:
    """Shapes of the batches, and what the metric was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.given: list[tuple[np.ndarray, np.ndarray]] = []

    def collate(self, examples):
        batch = pad(examples)
        self.batches.append(tuple(batch["input_ids"].shape))
        return batch

    def metric(self, prediction):
        self.given.append((prediction.predictions, prediction.label_ids))
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def evaluated(cls, args, model, data, metric=True):
    seen = Seen()
    trainer = cls(model, args, data_collator=seen.collate, compute_metrics=seen.metric if metric else None)
    return seen, trainer.predict(data)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    data, model = ragged_texts(23), tiny_bert().double()
    args = TrainingArguments(str(tmp_path_factory.mktemp("plain")), use_cpu=True, per_device_eval_batch_size=4)
    return data, model, *evaluated(Trainer, args, model, data)


def test_the_model_sees_sorted_texts_and_callers_the_datasets_order(plain, tmp_path):
    data, model, _, theirs = plain
    args = arguments(tmp_path, strategy="full", per_device_eval_batch_size=4)
    seen, ours = evaluated(TransferTrainer, args, copy.deepcopy(model), data)
    lengths = sorted((len(ids) for ids in data["input_ids"]), reverse=True)
    assert seen.batches == [(len(lengths[i : i + 4]), lengths[i]) for i in range(0, 23, 4)]
    assert ours.predictions == pytest.approx(theirs.predictions, abs=1e-12)
    assert ours.label_ids.tolist() == theirs.label_ids.tolist() == data["labels"]
    ((logits, labels),) = seen.given
    assert (logits == ours.predictions).all() and labels.tolist() == data["labels"]
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], abs=1e-12)
    assert ours.metrics["test_accuracy"] == theirs.metrics["test_accuracy"]
    assert (evaluated(TransferTrainer, args, copy.deepcopy(model), data, metric=False)[1].predictions == logits).all()


def test_where_the_order_is_trainers_own(plain, tmp_path):
    data, model, theirs_seen, theirs = plain
    for i, keys in enumerate((dict(), dict(strategy="full", include_for_metrics=["inputs"]))):
        args = arguments(tmp_path / str(i), per_device_eval_batch_size=4, **keys)
        seen, ours = evaluated(TransferTrainer, args, copy.deepcopy(model), data)
        assert seen.batches == theirs_seen.batches and (ours.predictions == theirs.predictions).all()
