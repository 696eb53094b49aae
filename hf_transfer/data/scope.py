"""Tasks that this package does not train, seen from the columns of a dataset: what their datasets are made of.

Only what is plain is named: a box or an answer's position is a column of its own kind, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Audio, ClassLabel, Image, Value

from hf_transfer.errors import UserError

_BOXES = ("bbox", "bboxes", "boxes")
_ANSWER = "answer_start"
_MASKS = ("mask", "masks", "segmentation", "segmentation_mask", "seg_mask", "annotation", "label", "labels")
_WORDS = ("tokens", "words")


def refuse_out_of_scope(features: Mapping[str, Any]) -> None:
    """Raises:
    UserError: the columns are those of a dataset for another task than classification and regression.
    """
    for name, feature in features.items():
        if (task := _task_of(name, feature, features)) is not None:
            raise UserError(
                f"column {name!r} is that of a dataset for {task}, which is out of scope: hf_transfer predicts one "
                "answer for a whole text or image (classes, several labels, a number).",
                "If the data has such an answer as well, name its column with label_column_name.",
                key="dataset_name",
            )


def _task_of(name: str, feature: Any, features: Mapping[str, Any]) -> str | None:
    inner = _inner(feature)
    fields = inner if isinstance(inner, Mapping) else {}
    if any(isinstance(f, Image) for f in features.values()) and (name in _BOXES or any(f in _BOXES for f in fields)):
        return "object detection"
    if _ANSWER in fields:
        return "extractive question answering"
    if type(feature).__name__ in ("Translation", "TranslationVariableLanguages") or (name == "translation" and fields):
        return "translation"
    if isinstance(feature, Audio):
        return "audio"
    if isinstance(feature, Image) and name in _MASKS and _other_image(name, features):
        return "segmentation"
    if _is_sequence(feature) and name not in _WORDS and any(_is_words(features.get(words)) for words in _WORDS):
        labels = isinstance(inner, ClassLabel) or name.endswith("_tags") or name in ("tags", "labels")
        return "token classification" if labels else None
    return None


def _other_image(name: str, features: Mapping[str, Any]) -> bool:
    return any(isinstance(f, Image) for other, f in features.items() if other != name)


def _is_words(feature: Any) -> bool:
    return _is_sequence(feature) and isinstance(inner := _inner(feature), Value) and inner.dtype == "string"


def _is_sequence(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature")


def _inner(feature: Any) -> Any:
    """What a list holds; the feature itself where it is none."""
    if isinstance(feature, list) and feature:
        return feature[0]
    return getattr(feature, "feature", feature)
