"""Image classification: an image processor and any Hugging Face or timm backbone with a classification head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, Value
from PIL.Image import fromarray
from transformers import AutoModelForImageClassification

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.augment import EXAMPLE, Augmentation, Chance, Mixed
from hf_transfer.data.duplicates import Trace, content_hash, look_hash
from hf_transfer.data.facts import Misfit, PixelFacts
from hf_transfer.data.header import check_column
from hf_transfer.data.image_paths import IMAGE_COLUMNS, IMAGE_SUFFIXES
from hf_transfer.data.images import (
    DEFAULT_RANGE,
    Range,
    encoded,
    extremes,
    glance,
    is_deep,
    num_beyond,
    open_image,
    to_channels,
    undecoded,
)
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.data.pixel_range import checked_range, decide_range, deep_extremes, num_clipped
from hf_transfer.data.splits import Data
from hf_transfer.errors import UserError, option
from hf_transfer.evaluation.corruptions import IMAGES
from hf_transfer.models.image_processors import channels_of, check_channels, complete_timm_config, load_processor
from hf_transfer.models.image_size import own_size, with_image_size
from hf_transfer.models.load import Loaded, load_config, load_model
from hf_transfer.tasks import image_fit
from hf_transfer.tasks.base import Task, spread
from hf_transfer.tasks.views import looks, most_looks


class ImageClassification(Task):
    """Image classification: one image column, and a Hugging Face or timm model."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    input_key = "image_column_name"
    suffixes = IMAGE_SUFFIXES
    mixes = True
    corruptions = IMAGES

    def input_columns(self, features: Mapping[str, Any], args: DataArguments) -> tuple[str, ...]:
        if args.image_column_name:
            check_column(args.image_column_name, features, "image_column_name")
            return (args.image_column_name,)
        images = [n for n, f in features.items() if isinstance(f, Image)] or _columns_of_bytes(features, args)
        if len(images) > 1:
            raise UserError("image_column_name: several columns contain images.", f"Name one of {', '.join(images)}.")
        return tuple(images)

    def load(self, model_args: ModelArguments, data_args: DataArguments, labels: Labels) -> tuple[Loaded, Any]:
        config, processor = self.saved_processor(model_args, data_args)
        return load_model(model_args, AutoModelForImageClassification, config, labels), processor

    def saved_processor(self, model_args: ModelArguments, data_args: DataArguments) -> tuple[Any, Any]:
        config = load_config(model_args, AutoModelForImageClassification)
        check_channels(config, str(model_args.model_name_or_path))
        if config.model_type == "timm_wrapper":
            complete_timm_config(config)
        if data_args.image_size:
            build = partial(AutoModelForImageClassification.from_config, trust_remote_code=model_args.trust_remote_code)
            config = with_image_size(config, data_args.image_size, build)
        processor = load_processor(model_args, config, data_args.image_size)
        pixel_range = checked_range(data_args.pixel_range) or getattr(config, "pixel_range", None)
        if pixel_range is not None:
            _set_range(config, processor, pixel_range)
        return config, processor

    def prepare(self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments) -> Dataset:
        (column,) = inputs
        split = split.cast_column(column, Image(decode=False))  # `read` decodes, as in prediction
        kept = [c for c in (column, LABELS, EXAMPLE) if c in split.column_names]
        return split.select_columns(kept).with_transform(partial(self._plain, column, processor))

    def _plain(self, column: str, processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
        images = self._read(batch[column], batch.get(EXAMPLE))
        return {**self.encode([images], processor), **_labels(batch)}

    def prepare_training(
        self, split: Dataset, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Dataset:
        if not (Augmentation.wanted(args) or Mixed.wanted(args)):
            return self.prepare(split, inputs, processor, args)
        (column,) = inputs
        kept = [c for c in (column, LABELS, EXAMPLE) if c in split.column_names]
        split = split.cast_column(column, Image(decode=False)).select_columns(kept)
        return split.with_transform(self.change(inputs, processor, args, chance))

    def change(
        self, inputs: tuple[str, ...], processor: Any, args: DataArguments, chance: Chance
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        (column,) = inputs
        return partial(self._changed, column, processor, Augmentation(args, processor, chance))

    def _changed(self, column: str, processor: Any, augment: Augmentation, batch: dict[str, Any]) -> dict[str, Any]:
        read = self._read(batch[column], batch[EXAMPLE])
        images = [_eight_bits(image, processor) for image in read]
        pixels = augment(images, batch[EXAMPLE], lambda some: self.encode([some], processor)["pixel_values"])
        return {"pixel_values": pixels, **_labels(batch), EXAMPLE: batch[EXAMPLE]}

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
                    f"Fix it, and resume the run with {option('resume_from_checkpoint', 'auto')}.",
                ) from error
        return images

    def read(self, value: Any) -> Any:
        """A PIL image; see `open_image` for the accepted values."""
        return open_image(value)

    def trace(self, values: Sequence[Any]) -> Trace:
        (cell,) = values
        content = encoded(cell)
        image, (width, height) = glance(content)
        own = extremes(image) if is_deep(image) else None  # compared by its contrasts only
        look = look_hash(to_channels(image, 3, own))
        return Trace(content_hash(content), look, {"width": width, "height": height})

    def settle(self, data: Data, model: Any, processor: Any, args: DataArguments) -> PixelFacts | None:
        (column,) = data.inputs
        measured = {name: deep_extremes(split, column) for name, split in data.splits.items()}
        if not any(map(len, measured.values())):
            return None
        pixel_range = checked_range(args.pixel_range) or decide_range(measured["train"]) or range_of(processor)
        if pixel_range is None:
            name = next(name for name, pairs in measured.items() if len(pairs))
            raise UserError(
                f"the {name} split has float or 32-bit images and the training split has none.",
                "Give the lowest and the highest value of such images, for example [0, 1].",
                key="pixel_range",
            )
        _set_range(model.config, processor, pixel_range)
        deep = {name: len(pairs) for name, pairs in measured.items()}
        return PixelFacts(pixel_range, deep, {name: num_clipped(p, pixel_range) for name, p in measured.items()})

    def misfits(self, split: Dataset, inputs: tuple[str, ...], model: Any, processor: Any) -> list[Misfit]:
        (column,) = inputs
        cells = undecoded(spread(split, image_fit.SAMPLE), inputs)[column][:]
        images = []
        for cell in cells:
            with contextlib.suppress(ValueError):  # what cannot be read is told elsewhere
                images.append(glance(encoded(cell)))
        return image_fit.misfits(images, own_size(model.config), channels_of(processor))

    def clipped(self, split: Dataset, inputs: tuple[str, ...], processor: Any) -> dict[str, int]:
        (column,) = inputs
        measured = deep_extremes(split, column)
        pixel_range = range_of(processor)
        if not len(measured):
            return {}
        if pixel_range is None:
            raise UserError(
                "the data has float or 32-bit images, and the model does not say their range.",
                "Give their lowest and highest value, for example [0, 1].",
                key="pixel_range",
            )
        return {"clipped_images": num_clipped(measured, pixel_range)}

    def remarks(self, values: Sequence[Any], processor: Any) -> dict[str, Any]:
        (image,) = values
        if not is_deep(image):
            return {}
        given = range_of(processor)
        low, high = given or DEFAULT_RANGE[image.mode]
        said = {} if given else {"pixel_range": f"unknown to the model, {low:g} to {high:g} assumed"}
        beyond = num_beyond(image, given)
        return said | ({"clipped_pixels": beyond} if beyond else {})

    def encode(self, columns: Sequence[Sequence[Any]], processor: Any) -> dict[str, Any]:
        images = [_eight_bits(image, processor) for image in columns[0]]
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

    def plain(self, values: Sequence[Any], processor: Any) -> tuple[Any, ...]:
        return tuple(_eight_bits(image, processor) for image in values)

    def preprocessing(self, processor: Any) -> dict[str, Any]:
        said = getattr(processor, "data_config", None) or processor.to_dict()
        return {"image_processor": type(processor).__name__, "pixel_range": range_of(processor), **said}

    def made_up(self, processor: Any, count: int) -> list[tuple[Any, ...]]:
        draw = np.random.default_rng(0)
        shapes = ((40 + 9 * i % 60, 40 + 17 * i % 90, 3) for i in range(count))
        return [(fromarray(draw.integers(0, 256, shape, dtype=np.uint8)),) for shape in shapes]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return _collate


def _columns_of_bytes(features: Mapping[str, Any], args: DataArguments) -> list[str]:
    """Columns of encoded images, or of what `datasets` stores for one; by their name, unless images are asked for."""
    binary = [n for n, f in features.items() if _is_binary(f.get("bytes") if isinstance(f, dict) else f)]
    named = [n for n in binary if n in IMAGE_COLUMNS or isinstance(features[n], dict)]
    return named or (binary if args.task == ImageClassification.name else [])


def _is_binary(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary", "binary_view")


def _labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The labels of a batch; empty of a target of domain adaptation, which has none."""
    return {name: values for name, values in batch.items() if name == LABELS}


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {"pixel_values": torch.stack([e["pixel_values"] for e in examples])}
    return batch | ({LABELS: torch.tensor([e[LABELS] for e in examples])} if LABELS in examples[0] else {})


def range_of(processor: Any) -> Range | None:
    """(lowest, highest) value of float and 32-bit images; None if the model's training data had none."""
    given = getattr(processor, "pixel_range", None)
    return (float(given[0]), float(given[1])) if given else None


def _set_range(config: Any, processor: Any, pixel_range: Sequence[float]) -> None:
    """The configuration is saved with the model, and timm's processors are not saved at all."""
    config.pixel_range = processor.pixel_range = [float(v) for v in pixel_range]


def _eight_bits(image: Any, processor: Any) -> Any:
    return to_channels(image, channels_of(processor), range_of(processor))
