"""One backbone for many adapters."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.errors import UserError
from hf_transfer.layers.identity import OF_A_TASK
from hf_transfer.models.heads import HEAD_KEY, unfilled
from hf_transfer.models.load import BACKBONES, Weights, backbone, with_head
from hf_transfer.models.source import read_config


@contextlib.contextmanager
def sharing(shared: SharedBackbone) -> Iterator[None]:
    """Context in which adapters are loaded on one backbone instead of separate backbones."""
    token = BACKBONES.set(shared.load)
    try:
        yield
    finally:
        BACKBONES.reset(token)


class SharedBackbone:
    """A backbone that is loaded once; every use gets its own modules around the same tensors."""

    def __init__(self) -> None:
        self.name = ""
        self._key: Any = None
        self._loaded: Weights | None = None

    def load(self, args: ModelArguments, auto_class: Any, config: PreTrainedConfig) -> Weights:
        """A model around the shared tensors, with a head for the labels of `config`: what `backbone` would load.

        Raises:
            UserError: the backbone differs from the one that was loaded first.
        """
        plain = {k: v for k, v in config.to_dict().items() if k not in (*OF_A_TASK, HEAD_KEY)}
        key = (args.model_name_or_path, args.model_revision, auto_class.__name__, json.dumps(plain, sort_keys=True))
        if self._loaded is None:
            loaded = backbone(args, auto_class, _for_task(config, read_config(args)))
            device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
            loaded.model.to(device)
            self._loaded, self._key, self.name = loaded, key, str(args.model_name_or_path)
        elif key != self._key:
            same = key[:2] == self._key[:2]
            raise UserError(
                f"bank: cannot add backbone {str(args.model_name_or_path)!r}"
                + (" with a different configuration" if same else "")
                + f"; the bank's backbone is {self.name!r}.",
                "Use one bank per backbone.",
            )
        model = self._loaded.model
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        shared[id(model.config)] = _for_task(model.config, config)
        own = copy.deepcopy(model, shared)
        if "num_labels" in vars(own):  # many models keep a copy outside their configuration, for the loss
            own.num_labels = config.num_labels
        missing = self._loaded.missing | _resized_head(own)
        return with_head(self._loaded._replace(model=own, missing=missing), config)


def _for_task(config: PreTrainedConfig, task: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a configuration with all that is a task's own as in `task`, and with a linear head."""
    copied = copy.deepcopy(config)
    for name in OF_A_TASK - {"_name_or_path", "transformers_version", "dtype"}:
        vars(copied).pop(name, None)
        if name in vars(task):
            setattr(copied, name, copy.deepcopy(vars(task)[name]))
    vars(copied).pop(HEAD_KEY, None)
    return copied


def _resized_head(model: Any) -> set[str]:
    """Replace the modules whose size does not fit the labels of the configuration.

    Returns:
        The parameters that have no values now.
    """
    blank, sizes = unfilled(model), dict(model.named_parameters())
    resized = {n for n, p in blank.named_parameters() if n in sizes and p.shape != sizes[n].shape}
    for name in {n.rpartition(".")[0] for n in resized}:
        model.set_submodule(name, blank.get_submodule(name).to_empty(device=model.device))
    return resized
