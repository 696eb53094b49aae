"""The head of an adapter that was saved without `config.json`, as peft alone saves one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedConfig

from hf_transfer.errors import UserError, one_line, option

_WEIGHTS = "adapter_model.safetensors"
_CLASSIFIERS = (AutoModelForSequenceClassification, AutoModelForImageClassification)


def config_with_head(place: str, adapter: PeftConfig, backbone: PreTrainedConfig, allow_pickle: bool) -> Any:
    """The configuration of a backbone with the head that the adapter's file holds.

    The number of labels is read from the shape of the head; their names stand nowhere, so they are LABEL_0, LABEL_1, …
    Without a head in the file, the backbone's configuration is returned as it is: the head is the backbone's, if any.

    Args:
        place: folder of the adapter.
        adapter: its configuration.
        backbone: configuration of its backbone.
        allow_pickle: whether weights that are not safetensors may be read.

    Raises:
        UserError: the weights cannot be read.
    """
    shapes = _shapes(place, allow_pickle)
    named = (adapter.auto_mapping or {}).get("base_model_class")
    for auto_class in _CLASSIFIERS:
        if type(backbone) not in auto_class._model_mapping:
            continue
        classes = auto_class._model_mapping[type(backbone)]
        names = {c.__name__ for c in (classes if isinstance(classes, list | tuple) else [classes])}
        if named not in (None, *names):
            continue
        sizes = {shapes[name][0] for name in _last_layer(auto_class, backbone) if name in shapes}
        if len(sizes) != 1:
            continue
        config = copy.deepcopy(backbone)
        (count,) = sizes
        config.id2label = {i: f"LABEL_{i}" for i in range(count)}
        config.label2id = {name: i for i, name in config.id2label.items()}
        config.problem_type = None
        config.architectures = [named or min(names, key=len)]
        return config
    return backbone


def _last_layer(auto_class: Any, config: PreTrainedConfig) -> list[str]:
    """Names of the parameters with one row per label: those whose shape follows the number of labels."""
    shapes = []
    for count in (5, 7):
        sized = copy.deepcopy(config)
        sized.id2label = {i: str(i) for i in range(count)}
        sized.label2id = {name: i for i, name in sized.id2label.items()}
        with torch.device("meta"):
            shapes.append({n: p.shape for n, p in auto_class.from_config(sized).named_parameters()})
    return [n for n, shape in shapes[0].items() if shapes[1].get(n) not in (None, shape)]


def _shapes(place: str, allow_pickle: bool) -> dict[str, Any]:
    """Shapes of the tensors of an adapter by the names that they have in its backbone."""
    path = Path(place) / _WEIGHTS
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        elif allow_pickle:
            shapes = {name: tuple(tensor.shape) for name, tensor in load_peft_weights(place, device="cpu").items()}
        else:
            raise UserError(
                f"the adapter in {place!r} has no {_WEIGHTS}.",
                f"If its weights are a pickle (adapter_model.bin), which can run code, {option('allow_pickle', True)} "
                "loads it.",
                key="model_name_or_path",
            )
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"the adapter in {place!r} cannot be read ({one_line(error)}).", key="model_name_or_path"
        ) from error
    return {n.removeprefix("base_model.model.").removeprefix("base_model."): s for n, s in shapes.items()}
