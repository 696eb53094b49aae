"""Image classification: an image processor and any Hugging Face or timm backbone with a classification head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from transformers import AutoModelForImageClassification

from hf_transfer.config.arguments.data import DataArguments
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.config.arguments.views import Views
from hf_transfer.data.augment import EXAMPLE, Augmentation, Chance, Mixed
from hf_transfer.data.duplicates import Trace, content_hash, look_hash
from hf_transfer.data.image_paths import IMAGE_SUFFIXES
from hf_transfer.data.images import glance, open_image, to_channels
from hf_transfer.data.labels import LABELS, Labels
from hf_transfer.errors import UserError, nearest, one_line
from hf_transfer.models.image_processors import channels_of, check_channels, complete_timm_config, load_processor
from hf_transfer.models.image_size import with_image_size
from hf_transfer.models.load import Loaded, load_config, load_model
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
        check_channels(config, str(model_args.model_name_or_path))
        if config.model_type == "timm_wrapper":
            complete_timm_config(config)
        if data_args.image_size:
            build = partial(AutoModelForImageClassification.from_config, trust_remote_code=model_args.trust_remote_code)
            config = with_image_size(config, data_args.image_size, build)
        processor = load_processor(model_args, config, data_args.image_size)
        return load_model(model_args, AutoModelForImageClassification, config, labels), processor

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
