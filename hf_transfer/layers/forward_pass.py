"""One forward pass of a model on a small example input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

# What a model of any architecture may raise on an input that it is not made for. Whoever catches
# these asks whether something is possible, and does without it or reports the text; training, evaluation and
# predictions catch none.
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError)


def called_modules(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """Those of `names` that a forward pass calls as modules, in order of use; None if no forward pass is possible.

    `torch.nn.MultiheadAttention` and timm's BEiT use the weights of some layers without calling them.
    """
    order: list[str] = []
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: None if n in order else order.append(n))
        for n in names
    ]
    try:
        output = forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return order if output else None


def forward(model: nn.Module, padded: bool = False) -> Any:
    """The model's output in eval mode for the batch of `example`; None if the model cannot process it.

    Raises:
        Exception: with `padded`, any of `REFUSALS` that the model raises.
    """
    batch = example(model, padded)
    if batch is None:
        return None
    was_training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return model(**batch)
    except REFUSALS:
        if padded:
            raise
        return None
    finally:
        for module, training in was_training.items():
            module.training = training


def example(model: Any, padded: bool = False) -> dict[str, torch.Tensor] | None:
    """A small input batch for a Hugging Face model.

    Args:
        model: the model, optionally wrapped by peft.
        padded: add a second, shorter text.

    Returns:
        `pixel_values` (1, channels, height, width), or `input_ids` and `attention_mask`, (1 or 2, 8); None if the model
        reads neither images nor tokens.
    """
    core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(core, PreTrainedModel):
        return None
    device, config = core.device, core.config
    if core.main_input_name == "pixel_values":
        values = config.to_dict()
        size = values.get("image_size") or (values.get("vision_config") or {}).get("image_size") or 64
        if config.model_type == "timm_wrapper":
            size = ((values.get("pretrained_cfg") or {}).get("input_size") or (3, 0))[1] or _timm_size(core)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, input_channels(config), height, width)
        return {"pixel_values": torch.linspace(-1, 1, math.prod(shape), device=device).sin().view(shape)}
    if core.main_input_name != "input_ids":
        return None
    ids = torch.arange(8, device=device).repeat(2 if padded else 1, 1) % 7 + 3
    eos = config.eos_token_id
    ids[:, -1] = eos if isinstance(eos, int) else 2  # BART classifies the EOS token
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:], ids[1, 5:] = 0, config.pad_token_id or 0
    return {"input_ids": ids, "attention_mask": mask}


def input_channels(config: Any) -> int:
    """Number of channels of the images that an image model reads, from its configuration."""
    values = config.to_dict()
    if config.model_type == "timm_wrapper":
        given = (config.model_args or {}).get("in_chans")
        return int(given or ((values.get("pretrained_cfg") or {}).get("input_size") or [3])[0])
    return int(values.get("num_channels") or (values.get("vision_config") or {}).get("num_channels") or 3)


def _timm_size(core: Any) -> int:
    embed = getattr(core.timm_model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return size[0] if size else 224
