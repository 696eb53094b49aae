"""Image classification: an image processor and any Hugging Face or timm backbone with a classification head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..config import DataArguments, ModelArguments
from ..data.load import LABELS
from ..errors import UserError, nearest, one_line
from ..models import Labels, Loaded, load_config, load_model, source
from .base import Task


class ImageClassification(Task):
    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    input_key = "image_column_name"
    suffixes = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))

    def input_columns(self, features: Mapping[str, Any], args: DataArguments) -> tuple[str, ...]:
        if args.image_column_name:
            if args.image_column_name not in features:
                raise UserError(
                    f"image_column_name: there is no column {args.image_column_name!r}.",
                    f"There are {', '.join(features)}.{nearest(args.image_column_name, features)}",
                )
            return (args.image_column_name,)
        images = [n for n, f in features.items() if isinstance(f, Image)]
        if len(images) > 1:
            raise UserError("image_column_name: several columns hold images.", f"Name one of {', '.join(images)}.")
        return tuple(images)

    def load(self, model_args: ModelArguments, data_args: DataArguments, labels: Labels) -> tuple[Loaded, Any]:
        config = load_config(model_args, AutoModelForImageClassification)
        if data_args.image_size and config.model_type == "timm_wrapper":
            _set_timm_size(config, data_args.image_size)
        loaded = load_model(model_args, AutoModelForImageClassification, config, labels)
        if data_args.image_size and config.model_type != "timm_wrapper":
            _set_size(loaded.model, data_args.image_size)
        return loaded, _load_processor(model_args, config, data_args.image_size)

    def prepare(self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments) -> Dataset:
        (column,) = inputs
        split = split.cast_column(column, Image(decode=False))  # also paths; `read` decodes, here as in prediction

        def read(cell: Any) -> Any:
            try:
                return self.read(cell)
            except ValueError as error:
                raise UserError(f"An image of the data, {cell.get('path') or 'without a name'}: {error}.") from error

        def transform(batch: dict[str, Any]) -> dict[str, Any]:
            return {**self.encode([[read(cell) for cell in batch[column]]], processor), LABELS: batch[LABELS]}

        return split.select_columns([column, LABELS]).with_transform(transform)

    def read(self, value: Any) -> Any:
        """A picture from a path, its bytes, a cell of a `datasets` image column, a picture or an array."""
        from PIL import Image as Pixels
        from PIL import ImageOps

        if isinstance(value, dict):  # how `datasets` stores an image in a file
            value = value.get("bytes") or value.get("path")
        try:
            if isinstance(value, str | Path):
                value = Path(value).read_bytes()
            if isinstance(value, bytes):
                image = Pixels.open(BytesIO(value))
                image.load()
                return ImageOps.exif_transpose(image)  # as `datasets` does
            if value is None:
                raise ValueError("there is none")
            return value if isinstance(value, Pixels.Image) else Pixels.fromarray(value)
        except (OSError, SyntaxError, ValueError, TypeError, AttributeError, Pixels.DecompressionBombError) as error:
            raise ValueError(f"it cannot be read as an image ({one_line(error, 100)})") from error

    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> dict[str, Any]:
        images = [image.convert("RGB") for image in columns[0]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return _collate


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {"pixel_values": torch.stack([e["pixel_values"] for e in examples])}
    return batch | ({LABELS: torch.tensor([e[LABELS] for e in examples])} if LABELS in examples[0] else {})


def _set_timm_size(config: PreTrainedConfig, size: int) -> None:
    """Tell the configuration the input size, so that what is saved loads with it."""
    config.pretrained_cfg = {**(config.to_dict().get("pretrained_cfg") or {}), "input_size": [3, size, size]}
    if config.pretrained_cfg.get("fixed_input_size"):
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}


def _set_size(model: PreTrainedModel, size: int) -> None:
    """The same for a Hugging Face model, which can change its size unless it has learnt a vector per position."""
    config = model.config
    if not hasattr(config, "image_size") or config.image_size == size:
        return
    if any("position_embedding" in name for name, _ in model.named_parameters()):
        raise UserError(
            f"image_size: {config.model_type} has positions for {config.image_size} pixels, not {size}.",
            "Leave image_size out, or take a convolutional or timm model.",
        )
    config.image_size = size


def _load_processor(args: ModelArguments, config: PreTrainedConfig, size: int | None) -> Any:
    if config.model_type == "timm_wrapper":
        import timm
        from transformers import TimmWrapperImageProcessor

        # It warns at every save that config.json already holds what it would write, which is what we rely on.
        logging.getLogger(TimmWrapperImageProcessor.__module__).setLevel(logging.ERROR)
        # A model made from a bare architecture says nothing of its input: timm does.
        usual = timm.get_pretrained_cfg(config.architecture, allow_unregistered=True)
        known = config.to_dict().get("pretrained_cfg") or (usual.to_dict() if usual else {})
        return TimmWrapperImageProcessor(known, architecture=config.architecture)
    place, options = source(args)
    try:
        processor = AutoImageProcessor.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: {args.model_name_or_path!r} has no image processor that can be loaded "
            f"({one_line(error)})."
        ) from error
    if size:
        resize_to = (
            {"shortest_edge": size} if "shortest_edge" in (processor.size or {}) else {"height": size, "width": size}
        )
        processor.size = resize_to
        if getattr(processor, "do_center_crop", None):
            processor.crop_size = {"height": size, "width": size}
    return processor
