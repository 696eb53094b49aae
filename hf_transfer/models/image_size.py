"""Another input size of an image model: whether its architecture allows it, and what that makes of its weights.

A size is decided before any weights are loaded, on models without memory (torch's `meta` device): a configuration is
accepted if a model built from it reads images of that size, and the checkpoint's weights fit it. Weights fit if their
shapes are the same, or if only tables of learned positions differ, which are interpolated:

- absolute positions of a grid, after the positions of special tokens (ViT: Dosovitskiy 2021, section 3.2);
- relative positions, (2h - 1) × (2w - 1) distances and those of special tokens (BEiT, Swin).

What is saved has the tables of its own size, so that transformers loads it without this package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_transfer.errors import UserError
from hf_transfer.layers.forward_pass import REFUSALS, input_channels

Build = Callable[[PreTrainedConfig], PreTrainedModel]
_REFUSALS = (*REFUSALS, AssertionError)
_MOST_SPECIAL = 8  # tokens before the grid: classes, distillation, registers
_UNIT = 32  # sizes near a refused one are multiples of it, or of a patch of more than _SMALL_PATCH pixels
_SMALL_PATCH = 8


def with_image_size(config: PreTrainedConfig, size: int, build: Build) -> PreTrainedConfig:
    """The configuration with which the checkpoint's model reads square images of another size.

    Args:
        config: the checkpoint's.
        size: side in pixels.
        build: makes a model from a configuration (`AutoModelForImageClassification.from_config`).

    Returns:
        A changed copy; the same settings where the model adapts itself to any size (DINOv2, convolutions).

    Raises:
        UserError: the architecture cannot read images of this size; the message names sizes near it that work.
    """
    trial = _Trial(config, build)
    if (chosen := trial.fitting(size)) is not None:
        return chosen
    sizes = trial.near(size)
    raise UserError(
        f"{size} is not possible for {_name(config)}.",
        f"Sizes that work: {', '.join(map(str, sizes))}." if sizes else "Remove image_size.",
        key="image_size",
    )


def own_size(config: PreTrainedConfig) -> int | None:
    """Side of the square images that a configuration is for, in pixels; None if it does not say."""
    size: Any
    if config.model_type == "timm_wrapper":
        size = (config.to_dict().get("pretrained_cfg") or {}).get("input_size")
    else:
        size = getattr(_holder(config), "image_size", None)
    size = size[-1] if isinstance(size, list | tuple) and size else size
    return int(size) if size else None


def resampled(name: str, table: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A table of learned positions for another grid; None if it is no such table, or does not fit `shape`.

    Args:
        name: the parameter's.
        table: (1, tokens, width), (tokens, width), (1, windows, tokens, width), (1, height, width, channels) or
            (1, channels, height, width) absolute positions, or (distances, heads) relative ones; grids are square.
        shape: the shape wanted.
    """
    if table.ndim != len(shape) or "pos" not in name:
        return None
    if "relative_position" in name or "rel_pos" in name:
        return _relative(table, shape)
    smooth = name.startswith("timm_model.")  # timm interpolates with antialiasing, transformers without
    if table.ndim == 4 and table.shape[:2] == tuple(shape[:2]) and table.shape[2] == table.shape[3]:
        return _interpolated(table.float(), shape[2], smooth).to(table.dtype) if shape[2] == shape[3] else None
    if table.ndim == 4 and table.shape[3] == shape[3] and table.shape[1] == table.shape[2] and shape[1] == shape[2]:
        channels_first = _interpolated(table.float().permute(0, 3, 1, 2), shape[1], smooth)
        return channels_first.to(table.dtype).permute(0, 2, 3, 1)
    return _absolute(table, shape, smooth)


def fill_resampled(model: PreTrainedModel, names: Sequence[str], load_own: Callable[[], nn.Module]) -> set[str]:
    """Fill position tables whose sizes differ from the checkpoint's by interpolating the checkpoint's.

    Args:
        model: built for another image size than the checkpoint.
        names: its parameters whose shapes differ from the checkpoint's.
        load_own: loads the checkpoint at its own size; only called if there may be such tables.

    Returns:
        Names of the parameters that were filled.
    """
    if model.main_input_name != "pixel_values" or not any("pos" in name for name in names):
        return set()
    parameters, own = dict(model.named_parameters()), dict(load_own().named_parameters())
    filled = set()
    for name in names:
        if name in own and (table := resampled(name, own[name].detach(), parameters[name].shape)) is not None:
            with torch.no_grad():
                parameters[name].copy_(table)
            filled.add(name)
    return filled


# ---- which configuration ----


class _Trial:
    """Models without weights, built to see which sizes they read.

    Args:
        config: the checkpoint's configuration.
        build: makes a model from a configuration.

    Raises:
        UserError: no model can be built from the configuration.
    """

    def __init__(self, config: PreTrainedConfig, build: Build):
        self.config, self.build, self.device = config, build, "meta"
        own = self._built(config)
        if own is None:  # some classes compute with values while they are built
            self.device = "cpu"
            own = self._built(config)
        if own is None:
            raise UserError(f"{_name(config)} cannot be built from its configuration.", key="model_name_or_path")
        self.own = own

    def fitting(self, size: int) -> PreTrainedConfig | None:
        """The first candidate that reads such images with the same weights, else with interpolated positions."""
        interpolating = None
        for candidate in _candidates(self.config, size):
            model = self._built(candidate)
            if model is None or not self._reads(model, size):
                continue
            differing = _differing(self.own, model)
            if differing and any(size % side for side in _patch(self.own)):
                return None  # the grid would leave out the last rows and columns of every image
            if not differing:
                return candidate
            if interpolating is None and all(resampled(n, t, shape) is not None for n, t, shape in differing):
                interpolating = candidate
        return interpolating

    def near(self, size: int) -> list[int]:
        """The nearest multiples of a patch below and above that work, and the checkpoint's own size, in order."""
        patch = max(_patch(self.own), default=0)
        unit = patch if patch > _SMALL_PATCH else _UNIT
        sizes = {size // unit * unit, size // unit * unit + unit} - {0, size}
        working = {s for s in sizes if self.fitting(s) is not None}
        given = own_size(self.config)
        if given and given != size and self._reads(self.own, given):
            working.add(given)
        return sorted(working)

    def _built(self, config: PreTrainedConfig) -> PreTrainedModel | None:
        try:
            with torch.device(self.device):
                return self.build(copy.deepcopy(config)).eval()
        except _REFUSALS:
            return None

    def _reads(self, model: PreTrainedModel, size: int) -> bool:
        try:
            with torch.no_grad():
                model(pixel_values=torch.zeros(1, input_channels(model.config), size, size, device=self.device))
        except _REFUSALS:
            return False
        return True


def _candidates(config: PreTrainedConfig, size: int) -> list[PreTrainedConfig]:
    """Configurations that may read images of this size, the most natural one first."""
    changed = copy.deepcopy(config)
    if config.model_type == "timm_wrapper":
        cfg, given = changed.to_dict().get("pretrained_cfg") or {}, config.model_args or {}
        changed.pretrained_cfg = {**cfg, "input_size": [input_channels(config), size, size]}
        options: list[dict[str, Any]] = [{}, {"dynamic_img_size": True}, {"img_size": size}]
        candidates = []
        for option in options:
            candidates.append(copy.deepcopy(changed))
            candidates[-1].model_args = {**given, **option} or None
        return candidates
    holder = _holder(changed)
    if getattr(holder, "image_size", None) is None:
        return [changed]
    several = isinstance(holder.image_size, list | tuple)
    holder.image_size = [size] * len(holder.image_size) if several else size
    return [changed, copy.deepcopy(config)]


def _holder(config: PreTrainedConfig) -> Any:
    """The configuration that has `image_size`: of models for texts and images, that of the image model."""
    return config if hasattr(config, "image_size") else getattr(config, "vision_config", config)


def _differing(own: PreTrainedModel, model: PreTrainedModel) -> list[tuple[str, Tensor, torch.Size]]:
    """(name, the checkpoint's tensor, shape wanted) of the parameters that differ."""
    before = dict(own.named_parameters())
    return [
        (n, before.get(n, torch.empty(0, device="meta")), p.shape)
        for n, p in model.named_parameters()
        if n not in before or before[n].shape != p.shape
    ]


def _patch(own: PreTrainedModel) -> list[int]:
    """Sides of a patch, or the distances between overlapping ones; empty if there are none."""
    if own.config.model_type == "timm_wrapper":
        patch: Any = getattr(getattr(own.timm_model, "patch_embed", None), "patch_size", None)
    else:
        holder = _holder(own.config)
        patch = getattr(holder, "patch_stride", None) or getattr(holder, "patch_size", None)
    return [side for side in (patch if isinstance(patch, list | tuple) else [patch]) if isinstance(side, int)]


def _name(config: PreTrainedConfig) -> str:
    return str(config.architecture) if config.model_type == "timm_wrapper" else f"a {config.model_type} model"


# ---- tables of positions ----


def _absolute(table: Tensor, shape: Sequence[int], smooth: bool) -> Tensor | None:
    """(…, special tokens + grid, width), resampled over the grid as transformers' and timm's ViT do."""
    *leading, tokens, width = table.shape
    if [*leading, width] != [*shape[:-2], shape[-1]]:
        return None
    special = next((n for n in range(_MOST_SPECIAL) if _side(tokens - n) and _side(shape[-2] - n)), None)
    if special is None:
        return None
    side, wanted = _side(tokens - special), _side(shape[-2] - special)
    flat = table.float().reshape(-1, tokens, width)
    grid = flat[:, special:].reshape(len(flat), side, side, width).permute(0, 3, 1, 2)
    grid = _interpolated(grid, wanted, smooth).permute(0, 2, 3, 1).reshape(len(flat), wanted * wanted, width)
    return torch.cat([flat[:, :special], grid], 1).reshape(*shape).to(table.dtype)


def _relative(table: Tensor, shape: Sequence[int]) -> Tensor | None:
    """((2h - 1)(2w - 1) + special, heads), resampled over the grid of distances."""
    if table.ndim != 2 or table.shape[1] != shape[1]:
        return None
    special = next((n for n in (0, 3) if _side(len(table) - n) % 2 and _side(shape[0] - n) % 2), None)
    if special is None:
        return None
    side, wanted = _side(len(table) - special), _side(shape[0] - special)
    grid = table[: side * side].float().T.reshape(1, -1, side, side)
    grid = _interpolated(grid, wanted).reshape(-1, wanted * wanted).T
    return torch.cat([grid.to(table.dtype), table[side * side :]])


def _side(area: int) -> int:
    """Side of a square of this area; 0 if there is none."""
    side = math.isqrt(max(area, 0))
    return side if side * side == area else 0


def _interpolated(grid: Tensor, side: int, smooth: bool = False) -> Tensor:
    """(batch, channels, side, side), bicubic; `smooth`: with antialiasing."""
    if grid.is_meta:  # only the shape is asked for
        return grid.new_empty((*grid.shape[:2], side, side))
    return nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=smooth)
