"""How a timm model pools its last layer, set in its configuration, so that plain transformers builds the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hf_transfer.layers.forward_pass import REFUSALS
from hf_transfer.layers.wrappers import timm_core

_NAMES = {"cls": "token", "mean": "avg", "max": "max"}  # ours -> timm's


def set_timm_pooling(model: Any, pooling: str) -> bool:
    """Make transformers' wrapper of a timm model pool its last layer in another way, in place.

    A ViT's final norm stays where it is, before the pooling (`fc_norm`). The weights have the same names as before;
    those of the head are new.

    Args:
        model: a model of transformers.
        pooling: `cls`, `mean` or `max`.

    Returns:
        Whether it was done; other models are as they were.
    """
    core = timm_core(model)[1]
    if core is None or not hasattr(core, "reset_classifier"):
        return False
    import timm  # slow

    name = _NAMES[pooling]
    args = {**(model.config.model_args or {}), "global_pool": name}
    if isinstance(getattr(core, "fc_norm", None), nn.Identity):
        args["fc_norm"] = False
    try:
        changed = copy.deepcopy(core)
        changed.reset_classifier(model.config.num_labels, global_pool=name)
        with torch.device("meta"):
            built = timm.create_model(
                model.config.architecture, pretrained=False, num_classes=model.config.num_labels, **args
            )
    except (*REFUSALS, AssertionError):
        return False
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (core, changed, built)]
    if shapes[0] != shapes[1] or shapes[1] != shapes[2]:
        return False
    model.timm_model = changed
    model.config.model_args = args
    return True
