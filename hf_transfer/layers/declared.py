"""Depths that a model declares itself: timm's `group_matcher`, or the block list of a Hugging Face model."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_transfer.layers.architectures import ARCHITECTURE_RULES, HEAD, POOLING_LAYER, STEM, Depth, Rule
from hf_transfer.layers.pass_through import PassThrough
from hf_transfer.layers.rules import HEAD_DEPTH, LAST_DEPTH, SYMBOLS
from hf_transfer.layers.wrappers import pretrained, timm_core

_HEAD_NAMES = re.compile(r"^(classifier|score|head|fc|classification_head|logits_proj|cls_classifier)(\.|$)")


def architecture_rules(core: nn.Module) -> tuple[Rule, ...]:
    """The entry of `ARCHITECTURE_RULES` for a model, if any, after the rules for a pooling layer, if it has one."""
    model, timm_model = pretrained(core), timm_core(core)[1]
    if timm_model is not None:
        return () if hasattr(timm_model, "group_matcher") else ARCHITECTURE_RULES.get(type(timm_model).__name__, ())
    if model is None:
        return ()
    number = vars(model.config).get(POOLING_LAYER)
    pooling: tuple[Rule, ...] = ((rf"\.layer\.{number}\.", HEAD), (r"\.pooler\.", HEAD)) if number is not None else ()
    return pooling + ARCHITECTURE_RULES.get(model.config.model_type, ())


def reads_tokens(core: nn.Module) -> bool:
    """Whether the main input of a model is token ids."""
    model = pretrained(core)
    return model is not None and model.main_input_name == "input_ids"


def declared_depths(core: nn.Module) -> dict[str, Depth]:
    """Depths of the parameters as the model itself declares them; empty if it declares none."""
    prefix, timm_model = timm_core(core)
    if timm_model is not None:
        return {prefix + n: d for n, d in _timm_depths(timm_model).items()}
    return _block_list_depths(core)


def _timm_depths(model: Any) -> dict[str, Depth]:
    """The order given by timm's `group_matcher`, with the classifier separated as the head."""
    if not hasattr(model, "group_matcher"):
        return {}  # `ARCHITECTURE_RULES` may have an entry for the class
    from timm.models import group_parameters

    by_group = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    # A model built without `timm.create_model` does not declare its classifier, so the head is found by name.
    declared = (model.pretrained_cfg.get("classifier") or ()) if hasattr(model, "pretrained_cfg") else ()
    heads = (declared,) if isinstance(declared, str) else tuple(declared)

    def is_head(name: str) -> bool:
        return any(name == h or name.startswith(f"{h}.") for h in heads) if heads else bool(_HEAD_NAMES.match(name))

    depths: dict[str, Depth] = {n: HEAD_DEPTH if is_head(n) else (float(g),) for n, g in by_group.items()}
    # timm puts layers between the blocks and the classifier in the classifier's group; here they join the last block.
    head_groups = {by_group[n] for n in by_group if is_head(n)}
    with_blocks = {g for g in by_group.values() if g not in head_groups}
    return {n: LAST_DEPTH if d != HEAD_DEPTH and by_group[n] not in with_blocks else d for n, d in depths.items()}


def _block_list_depths(core: nn.Module) -> dict[str, Depth]:
    """Depths from the model's list of repeated blocks; other parameters are placed by their order of definition."""
    blocks = _blocks(core)
    if not blocks:
        return {}
    names = [n for n, _ in core.named_parameters()]
    is_head = _head_test(core)
    block_of = {n: i for i, block in enumerate(blocks) for n in names if n.startswith(f"{block}.")}
    depths: dict[str, Depth] = {}
    upcoming = 0  # index of the next block
    for name in names:
        if name in block_of:
            depths[name] = (1.0 + block_of[name],)
            upcoming = max(upcoming, block_of[name] + 1)
        elif is_head(name):
            depths[name] = HEAD_DEPTH
        elif upcoming == 0:
            depths[name] = SYMBOLS[STEM]
        else:
            depths[name] = (1.0 + upcoming,) if upcoming < len(blocks) else LAST_DEPTH
    return depths


def _blocks(core: nn.Module) -> list[str]:
    """Paths of the outermost repeated blocks, in definition order."""
    layers = sys.modules.get("transformers.modeling_layers")
    model = pretrained(core)
    declared = (model._no_split_modules or ()) if model is not None else ()
    lists = [
        [f"{name}.{i}" for i in range(len(module))]
        for name, module in sorted(
            (
                (n, m)
                for n, m in core.named_modules()
                if isinstance(m, nn.ModuleList) and len({type(x) for x in m} - {PassThrough}) == 1
            ),
            key=lambda item: -sum(p.numel() for p in item[1].parameters()),
        )
    ]
    candidates = [
        _outermost(core, lambda m: isinstance(m, layers.GradientCheckpointingLayer)) if layers is not None else [],
        _outermost(core, lambda m: type(m).__name__ in declared),
        *([max(lists, key=lambda paths: (len(paths) > 1, -lists.index(paths)))] if lists else []),
    ]
    # One-layer models exist, but a candidate with several blocks is more reliable.
    return next((paths for paths in candidates if len(paths) > 1), next((paths for paths in candidates if paths), []))


def _outermost(core: nn.Module, is_block: Callable[[nn.Module], bool]) -> list[str]:
    """Paths of the modules with parameters that satisfy `is_block` and are not inside another such module."""
    blocks: list[str] = []
    for name, module in core.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if name and is_block(module) and not inside and any(True for _ in module.parameters()):
            blocks.append(name)
    return blocks


def _head_test(core: nn.Module) -> Callable[[str], bool]:
    """A function that tells whether a parameter belongs to the head, by its name."""
    model = pretrained(core)
    if model is not None and model.base_model is not model:
        return lambda name: not name.startswith(f"{model.base_model_prefix}.")
    return lambda name: bool(_HEAD_NAMES.match(name))
