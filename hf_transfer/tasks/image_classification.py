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
    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    input_key = "image_column_name"
    suffixes = IMAGE_SUFFIXES
    mixes = True

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
        """Pictures of a data set; `rows` are theirs in the data as it was given.

        Raises:
            UserError: names the one that cannot be read: it was not looked at before, or has changed since.
        """
        found = []
        for i, cell in enumerate(cells):
            try:
                found.append(self.read(cell))
            except ValueError as error:
                path = cell.get("path") if isinstance(cell, dict) else None
                name = path or ("without a name" if rows is None else f"row {rows[i]}")
                raise UserError(
                    f"An image of the data, {name}: {error}.",
                    "Put it right; a run goes on with --resume_from_checkpoint auto.",
                ) from error
        return found

    def read(self, value: Any) -> Any:
        """A picture from a path, its bytes, a cell of a `datasets` image column, a picture or an array."""
        return open_image(value)

    def trace(self, values: Sequence[Any]) -> Trace:
        (cell,) = values
        stored, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
        try:
            content = stored if stored is not None else Path(str(path)).read_bytes()
        except (OSError, TypeError) as error:
            raise ValueError(f"it cannot be read as an image ({one_line(error, 100)})") from error
        image, (width, height) = glance(content)
        return Trace(content_hash(content), look_hash(to_channels(image, 3)), {"width": width, "height": height})

    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> dict[str, Any]:
        images = [to_channels(image, channels_of(processor)) for image in columns[0]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    def look(
        self, columns: Sequence[Sequence[Any]], processor: Any, views: Views, args: DataArguments
    ) -> tuple[Mapping[str, Any], list[int]]:
        if views.stride is not None:
            raise UserError("stride: it is for long texts, and the model reads images.", "Leave it out.")
        mirrored = args.augmentation != "none" and args.horizontal_flip > 0
        if views.tta > most_looks(mirrored):
            without = "" if mirrored else ", none of them mirrored, as in training"
            raise UserError(f"tta: {views.tta} looks at an image, and there are {most_looks(mirrored)}{without}.")
        seen = [look for image in columns[0] for look in looks(image, views.tta, mirrored)]
        return self.encode([seen], processor), [i for i in range(len(columns[0])) for _ in range(views.tta)]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return _collate


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {"pixel_values": torch.stack([e["pixel_values"] for e in examples])}
    return batch | ({LABELS: torch.tensor([e[LABELS] for e in examples])} if LABELS in examples[0] else {})


def _set_timm_size(config: PreTrainedConfig, size: int) -> None:
    """Tell the configuration the input size, so that what is saved loads with it."""
    known = config.to_dict().get("pretrained_cfg") or {}
    config.pretrained_cfg = {**known, "input_size": [_timm_channels(config, known), size, size]}
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
        if "input_size" in known:
            channels = _timm_channels(config, known)
            known = {**known, "input_size": [channels, *known["input_size"][1:]]}
            known |= {k: _for_channels(known[k], channels) for k in ("mean", "std") if known.get(k)}
        return TimmWrapperImageProcessor(known, architecture=config.architecture)
    place, options = source(args)
    try:
        processor = AutoImageProcessor.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: {args.model_name_or_path!r} has no image processor that can be loaded "
            f"({one_line(error)})."
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
    """1 for a model that reads grey pictures, else 3: as many as there are means to subtract."""
    if hasattr(processor, "data_config"):  # timm's
        return int(processor.data_config["input_size"][0])
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, list | tuple) else 3


def _timm_channels(config: PreTrainedConfig, known: Mapping[str, Any]) -> int:
    given = (config.model_args or {}).get("in_chans")
    return int(given or (known.get("input_size") or [3])[0])


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    """A statistic per channel for another number of them: processors have three where nobody set them."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
