"""Thresholds on the probabilities of several labels, tuned on the validation split and stored with the model."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import Trainer

from hf_transfer.evaluation import metrics

LABEL_THRESHOLDS = "label_thresholds"  # entry of the configuration
THRESHOLD = 0.5  # default threshold on a label's probability


def thresholds_of(config: Any) -> list[float]:
    """The tuned threshold of each label, in the order of the logits; empty if they were not tuned."""
    by_name = getattr(config, LABEL_THRESHOLDS, None) or {}
    return [by_name[str(config.id2label[i])] for i in sorted(config.id2label)] if by_name else []


def tune_thresholds(trainer: Trainer, validation: Dataset) -> None:
    """Choose the threshold of each label on the validation split and store it in the model's configuration."""
    prediction = trainer.predict(validation)
    thresholds = metrics.best_thresholds(logits_of(prediction.predictions), prediction.label_ids)
    config = trainer.model.config
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    config.label_thresholds = dict(zip(names, thresholds, strict=True))


def logits_of(predictions: Any) -> Any:
    """The logits among a Trainer's predictions; some models return hidden states too."""
    return predictions[0] if isinstance(predictions, tuple) else predictions
