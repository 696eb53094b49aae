"""Image classification: an image processor and any Hugging Face or timm backbone with a classification head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.augment import EXAMPLE, Augmentation, Chance, Mixed
from hf_transfer.data.duplicates import Trace, content_hash, look_hash
from hf_transfer.data.image_paths import IMAGE_SUFFIXES
from hf_transfer.data.images import glance, open_image, to_channels
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.errors import UserError, nearest, one_line
from hf_transfer.models.load import Loaded, load_config, load_model, source
from hf_transfer.tasks.base import Task
from hf_transfer.tasks.views import looks, most_looks


class ImageClassification(Task):
    """Image classification: one image column, and a Hugging Face or timm model."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    input_key = "image_column_name"
    suffixes = IMAGE_SUFFIXES
    mixes = True

    def input_columns(self, features: Mapping[str, Any], args: DataArguments) -> tuple[str, ...]:
        if args.image_column_name:
            if args.image_column_name not in features:
                raise UserError(
                    f"image_column_name: column {args.image_column_name!r} does not exist.",
                    f"The columns are {', '.join(features)}.{nearest(args.image_column_name, features)}",
                )
            return (args.image_column_name,)
        images = [n for n, f in features.items() if isinstance(f, Image)]
        if len(images) > 1:
            raise UserError("image_column_name: several columns contain images.", f"Name one of {', '.join(images)}.")
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
        split = split.cast_column(column, Image(decode=False))  # `read` decodes, as in prediction
        kept = [c for c in (column, LABELS, EXAMPLE) if c in split.column_names]
        return split.select_columns(kept).with_transform(partial(self._plain, column, processor))

    def _plain(self, column: str, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        images = self._read(batch[column], batch.get(EXAMPLE))
        return {**self.encode([images], processor), LABELS: batch[LABELS]}

    def prepare_training(
        self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Dataset:
        if not (Augmentation.wanted(args) or Mixed.wanted(args)):
            return self.prepare(split, inputs, processor, args)
        (column,) = inputs
        split = split.cast_column(column, Image(decode=False)).select_columns([column, LABELS, EXAMPLE])
        return split.with_transform(self.change(inputs, processor, args, chance))

    def change(
        self, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        (column,) = inputs
        return partial(self._changed, column, processor, Augmentation(args, processor, chance))

    def _changed(self, column: str, processor: Any, augment: Augmentation, batch: dict[str, Any]) -> dict[str, Any]:
        read = self._read(batch[column], batch[EXAMPLE])
        images = [to_channels(image, channels_of(processor)) for image in read]
        pixels = augment(images, batch[EXAMPLE], lambda some: self.encode([some], processor)["pixel_values"])
        return {"pixel_values": pixels, LABELS: batch[LABELS], EXAMPLE: batch[EXAMPLE]}

    def _read(self, cells: Sequence[Any], rows: Sequence[int] | None) -> list[Any]:
        """Decode the images of a batch; `rows` are their rows in the input data.

        Raises:
            UserError: an image cannot be read: it was not examined before training, or has changed since.
        """
        images = []
        for i, cell in enumerate(cells):
            try:
                images.append(self.read(cell))
            except ValueError as error:
                path = cell.get("path") if isinstance(cell, dict) else None
                name = path or ("unnamed image" if rows is None else f"row {rows[i]}")
                raise UserError(
                    f"Bad image in the dataset, {name}: {error}.",
                    "Fix it, and resume the run with --resume_from_checkpoint auto.",
                ) from error
        return images

    def read(self, value: Any) -> Any:
        """A PIL image; see `open_image` for the accepted values."""
        return open_image(value)

    def trace(self, values: Sequence[Any]) -> Trace:
        (cell,) = values
        stored, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
        try:
            content = stored if stored is not None else Path(str(path)).read_bytes()
        except (OSError, TypeError) as error:
            raise ValueError(f"cannot be read as an image ({one_line(error, 100)})") from error
        image, (width, height) = glance(content)
        return Trace(content_hash(content), look_hash(to_channels(image, 3)), {"width": width, "height": height})

    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> dict[str, Any]:
        images = [to_channels(image, channels_of(processor)) for image in columns[0]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    def look(
        self, columns: Sequence[Sequence[Any]], processor: Any, views: Views, args: DataArguments
    ) -> tuple[Mapping[str, Any], list[int]]:
        if views.stride is not None:
            raise UserError("stride: only applies to text, and the model reads images.", "Remove stride.")
        mirrored = args.augmentation != "none" and args.horizontal_flip > 0
        if views.tta > most_looks(mirrored):
            without = "" if mirrored else " (none mirrored, as in training)"
            raise UserError(f"tta: {views.tta} exceeds the maximum of {most_looks(mirrored)} views per image{without}.")
        images = [view for image in columns[0] for view in looks(image, views.tta, mirrored)]
        return self.encode([images], processor), [i for i in range(len(columns[0])) for _ in range(views.tta)]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return _collate


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {"pixel_values": torch.stack([e["pixel_values"] for e in examples])}
    return batch | ({LABELS: torch.tensor([e[LABELS] for e in examples])} if LABELS in examples[0] else {})


def _set_timm_size(config: PreTrainedConfig, size: int) -> None:
    """Set the input size of a timm model in its configuration, so that the saved model loads with it."""
    pretrained = config.to_dict().get("pretrained_cfg") or {}
    config.pretrained_cfg = {**pretrained, "input_size": [_timm_channels(config, pretrained), size, size]}
    if config.pretrained_cfg.get("fixed_input_size"):
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}


def _set_size(model: PreTrainedModel, size: int) -> None:
    """Set the input size of a Hugging Face model.

    Raises:
        UserError: the model has learned position embeddings for another size.
    """
    config = model.config
    if not hasattr(config, "image_size") or config.image_size == size:
        return
    if any("position_embedding" in name for name, _ in model.named_parameters()):
        raise UserError(
            f"image_size: {size} does not match the position embeddings of {config.model_type}, which are for "
            f"{config.image_size} pixels.",
            "Remove image_size, or use a convolutional or timm model.",
        )
    config.image_size = size


def _load_processor(args: ModelArguments, config: PreTrainedConfig, size: int | None) -> Any:
    if config.model_type == "timm_wrapper":
        import timm
        from transformers import TimmWrapperImageProcessor

        # It warns at every save that its configuration is already in config.json, which is intended here.
        logging.getLogger(TimmWrapperImageProcessor.__module__).setLevel(logging.ERROR)
        # A model created from a bare architecture name has no input configuration; timm's default is used.
        default = timm.get_pretrained_cfg(config.architecture, allow_unregistered=True)
        pretrained = config.to_dict().get("pretrained_cfg") or (default.to_dict() if default else {})
        if "input_size" in pretrained:
            channels = _timm_channels(config, pretrained)
            pretrained = {**pretrained, "input_size": [channels, *pretrained["input_size"][1:]]}
            pretrained |= {k: _for_channels(pretrained[k], channels) for k in ("mean", "std") if pretrained.get(k)}
        return TimmWrapperImageProcessor(pretrained, architecture=config.architecture)
    place, options = source(args)
    try:
        processor = AutoImageProcessor.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load an image processor from {args.model_name_or_path!r} ({one_line(error)}).",
            key="model_name_or_path",
        ) from error
    if config.to_dict().get("num_channels") and getattr(processor, "image_mean", None):
        channels = int(config.num_channels)
        processor.image_mean = _for_channels(processor.image_mean, channels)
        processor.image_std = _for_channels(processor.image_std, channels)
        if channels == 1 and getattr(processor, "do_convert_rgb", None):
            processor.do_convert_rgb = False
    if size:
        resize_to = (
            {"shortest_edge": size} if "shortest_edge" in (processor.size or {}) else {"height": size, "width": size}
        )
        processor.size = resize_to
        if getattr(processor, "do_center_crop", None):
            processor.crop_size = {"height": size, "width": size}
    return processor


def channels_of(processor: Any) -> int:
    """Number of input channels: 1 for grayscale, 3 for RGB; as many as the processor has channel means."""
    if hasattr(processor, "data_config"):  # timm's
        return int(processor.data_config["input_size"][0])
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, list | tuple) else 3


def _timm_channels(config: PreTrainedConfig, pretrained: Mapping[str, Any]) -> int:
    given = (config.model_args or {}).get("in_chans")
    return int(given or (pretrained.get("input_size") or [3])[0])


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    """Per-channel means or standard deviations for another number of channels, as their average."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
