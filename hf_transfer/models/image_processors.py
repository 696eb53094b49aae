"""Image processors: the checkpoint's own, for its number of channels and the image size of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig

from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.errors import UserError, one_line
from hf_transfer.layers.forward_pass import input_channels
from hf_transfer.models.source import processor_source

_KEY = "model_name_or_path"
_SIDE = 64  # pixels of the image that is preprocessed to see what comes out


def check_channels(config: PreTrainedConfig, name: str) -> None:
    """Raises:
    UserError: the model reads neither grayscale nor RGB images.
    """
    channels = input_channels(config)
    if channels not in (1, 3):
        raise UserError(
            f"{name!r} reads images of {channels} channels; images are given as grayscale (1) or RGB (3).",
            "Use a model of 1 or 3 channels.",
            key=_KEY,
        )


def complete_timm_config(config: PreTrainedConfig) -> None:
    """Write into a timm model's configuration how its images are preprocessed, so that what is saved says it.

    The configuration of a bare architecture has no preprocessing: timm's default is used. Means and standard deviations
    are those of the model's number of channels.
    """
    import timm

    default = timm.get_pretrained_cfg(config.architecture, allow_unregistered=True)
    cfg = config.to_dict().get("pretrained_cfg") or (default.to_dict() if default else {})
    cfg = {k: v for k, v in cfg.items() if k != "num_classes"}
    channels = input_channels(config)
    if "input_size" in cfg:
        cfg["input_size"] = [channels, *cfg["input_size"][1:]]
        cfg |= {k: _for_channels(cfg[k], channels) for k in ("mean", "std") if cfg.get(k)}
    config.pretrained_cfg = cfg


def load_processor(args: ModelArguments, config: PreTrainedConfig, size: int | None) -> Any:
    """The image processor of a checkpoint.

    Args:
        args: model keys.
        config: the model's configuration; for timm models as `complete_timm_config` leaves it.
        size: side of the square images in pixels; None for the checkpoint's own.

    Raises:
        UserError: there is none, or it cannot give images of this size or number of channels.
    """
    if config.model_type == "timm_wrapper":
        from transformers import TimmWrapperImageProcessor

        # It warns at every save that its configuration is already in config.json, which is intended here.
        logging.getLogger(TimmWrapperImageProcessor.__module__).setLevel(logging.ERROR)
        return TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)
    place, options = processor_source(args)
    try:
        processor = AutoImageProcessor.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load an image processor from {args.model_name_or_path!r} ({one_line(error)}).", key=_KEY
        ) from error
    channels = input_channels(config)
    _set_channels(processor, channels)
    if size:
        _set_size(processor, size)
    if size or channels == 1:
        _check_output(processor, channels, size)
    return processor


def channels_of(processor: Any) -> int:
    """Number of input channels: 1 for grayscale, 3 for RGB; as many as the processor has channel means."""
    if hasattr(processor, "data_config"):  # timm's
        return int(processor.data_config["input_size"][0])
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, list | tuple) else 3


def _set_channels(processor: Any, channels: int) -> None:
    if getattr(processor, "image_mean", None):
        processor.image_mean = _for_channels(processor.image_mean, channels)
        processor.image_std = _for_channels(processor.image_std, channels)
    if channels == 1 and getattr(processor, "do_convert_rgb", None):
        processor.do_convert_rgb = False


def _set_size(processor: Any, size: int) -> None:
    square = {"height": size, "width": size}
    processor.size = {"shortest_edge": size} if "shortest_edge" in (processor.size or {}) else square
    if getattr(processor, "do_center_crop", None):
        processor.crop_size = square


def _check_output(processor: Any, channels: int, size: int | None) -> None:
    """Preprocess an image.

    Raises:
        UserError: the result has another size or number of channels.
    """
    image = Image.new("L" if channels == 1 else "RGB", (2 * (size or _SIDE), size or _SIDE))
    name = type(processor).__name__
    try:
        shape = tuple(processor([image], return_tensors="pt")["pixel_values"].shape[1:])
    except (ValueError, RuntimeError, IndexError) as error:
        shape, name = (), f"{name} ({one_line(error, 100)})"
    if shape[:1] != (channels,):
        raise UserError(
            f"the model reads images of {channels} channel{'s'[: channels > 1]}, and {name} does not give them.",
            "Use a model of 3 channels.",
            key=_KEY,
        )
    if size and shape[1:] != (size, size):
        raise UserError(
            f"{size} is not possible: {name} gives images of {shape[1]} × {shape[2]}.",
            "Remove image_size.",
            key="image_size",
        )


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    """Per-channel means or standard deviations for another number of channels, as their average."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
