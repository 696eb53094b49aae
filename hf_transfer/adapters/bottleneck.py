"""Residual bottleneck adapters as a peft method: `y + up(act(down(y)))` after the output projection of a sub-layer.

`houlsby` adds one adapter after each sub-layer of a block, attention and feed-forward (Houlsby et al. 2019, section
2.1); `pfeiffer` adds one per block, after its last sub-layer (Pfeiffer et al. 2021, section 3.2). `up` is initialized
to zero, so that training starts from the pretrained function. peft 0.21 has no such method: importing this module
registers it, and peft saves, loads and switches it like its own methods. Saved adapters can be loaded wherever
`hf_transfer` is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_transfer.errors import UserError, nearest
from hf_transfer.layers.groups import LayerGroup

KIND = "BOTTLENECK"
PLACEMENTS = ("houlsby", "pfeiffer")


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of residual bottleneck adapters.

    Attributes:
        placement: `houlsby` (two adapters per transformer block) or `pfeiffer` (one).
        reduction_factor: width of the layer divided by the width of the bottleneck.
        non_linearity: name of a transformers activation.
        target_modules: layers followed by an adapter; filled in from the model.
        exclude_modules: exceptions to `target_modules`.
        modules_to_save: modules that are fully trained and saved; the head is added.

    Raises:
        UserError: unknown placement or activation, or a reduction factor that is not positive.
    """

    placement: str = "pfeiffer"
    reduction_factor: float = 16
    non_linearity: str = "relu"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KIND
        if self.placement not in PLACEMENTS:
            raise UserError(
                f"adapter: placement {self.placement!r} is not one of {', '.join(PLACEMENTS)}."
                f"{nearest(self.placement, PLACEMENTS)}"
            )
        if not self.reduction_factor > 0:
            raise UserError(f"adapter: reduction_factor {self.reduction_factor!r} is not a positive number.")
        if self.non_linearity not in ACT2FN:
            raise UserError(
                f"adapter: transformers has no activation {self.non_linearity!r}."
                f"{nearest(self.non_linearity, ACT2FN.keys())}"
            )


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A layer followed by a bottleneck; its output is (..., width) for linear layers, (batch, width, ...) for
    convolutions.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    base_layer: Any
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any
    _move_adapter_to_device_of_base_layer: Any
    bottleneck_down: Any
    bottleneck_up: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activations: dict[str, nn.Module] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add the adapter `adapter_name`."""
        base = self.get_base_layer()
        width = output_width(base)
        narrow = max(1, round(width / config.reduction_factor))
        convolution: Any = next((c for c in (nn.Conv1d, nn.Conv2d) if isinstance(base, c)), None)
        sizes = ((width, narrow), (narrow, width))
        down, up = (convolution(*s, 1) if convolution else nn.Linear(*s) for s in sizes)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activations[adapter_name] = ACT2FN[config.non_linearity]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.bottleneck_up:
                y = y + self.bottleneck_up[name](self.activations[name](self.bottleneck_down[name](y)))
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UserError(
            "A bottleneck adapter is nonlinear and cannot be merged into its layer.",
            "Keep it separate, or train lora, whose update can be merged.",
        )


class BottleneckModel(BaseTuner):
    """peft's wrapper around a model with bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def output_width(layer: nn.Module) -> int:
    """Number of output features or channels of a layer."""
    if isinstance(layer, Conv1D):
        return int(layer.nf)
    return int(layer.out_channels if isinstance(layer, nn.Conv1d | nn.Conv2d) else layer.out_features)  # type: ignore[arg-type]


def places(model: nn.Module, groups: Sequence[LayerGroup], order: Sequence[str], placement: str | None) -> list[str]:
    """The last layer of each sub-layer of a block, inferred from the order of use and the widths of the layers.

    The last layer of a block has the block's width. An earlier sub-layer ends with the last layer of that width before
    a wider one, such as the output projection of attention before the feed-forward layer.

    Args:
        model: a model without an adapter.
        groups: its layer groups.
        order: names of its linear layers and convolutions in order of use.
        placement: `houlsby` for all sub-layers, else only the last one of each block.
    """
    targets: list[str] = []
    for group in groups[:-1]:
        own = set(group.parameters)
        layers = [n for n in order if f"{n}.weight" in own]
        inside = [n for n in layers if f".{group.name}." in f".{n}"]  # without a pooler grouped with the last block
        layers = inside or layers
        widths = [output_width(model.get_submodule(n)) for n in layers]
        ends, candidate = [], None
        for name, width in zip(layers, widths, strict=True):
            if width > widths[-1] and candidate is not None:
                ends.append(candidate)
                candidate = None
            elif width == widths[-1]:
                candidate = name
        ends += [candidate] if candidate is not None else []
        targets += ends if placement == "houlsby" else ends[-1:]
    return targets


def _register() -> None:
    """Register the method in peft's mappings; `register_peft_method` only accepts members of peft's own enum."""
    registered: Mapping[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    if KIND not in registered:
        PEFT_TYPE_TO_CONFIG_MAPPING[KIND] = BottleneckConfig
        PEFT_TYPE_TO_TUNER_MAPPING[KIND] = BottleneckModel
        PEFT_TYPE_TO_PREFIX_MAPPING[KIND] = BottleneckModel.prefix


_register()
