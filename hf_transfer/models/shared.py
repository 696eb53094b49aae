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
from hf_transfer.data.labels import Labels
from hf_transfer.errors import UserError
from hf_transfer.models.heads import HEAD_KEY
from hf_transfer.models.load import BACKBONES, Weights, from_checkpoint, with_head

# What a task adds to the configuration of its backbone.
_LABEL_KEYS = (
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "label_names",
    "num_classes",
    "architectures",
    "_name_or_path",
    "label_thresholds",
    "conformal",
    HEAD_KEY,
)


@contextlib.contextmanager
def sharing(backbone: SharedBackbone) -> Iterator[None]:
    """Context in which adapters are loaded on `backbone` instead of separate backbones."""
    token = BACKBONES.set(backbone.load)
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
        """A model around the shared tensors, with a head for the labels of `config`.

        Raises:
            UserError: the backbone differs from the one that was loaded first.
        """
        plain = {k: v for k, v in config.to_dict().items() if k not in (*_LABEL_KEYS, "transformers_version", "dtype")}
        key = (args.model_name_or_path, args.model_revision, auto_class.__name__, json.dumps(plain, sort_keys=True))
        if self._loaded is None:
            plain_head = copy.deepcopy(config)
            vars(plain_head).pop(HEAD_KEY, None)
            loaded = from_checkpoint(args, auto_class, plain_head)
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
        model, missing, origin = self._loaded.model, self._loaded.missing, self._loaded.origin
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        own = copy.deepcopy(model, shared)
        for name, value in Labels.of(config).config_kwargs.items():
            setattr(own.config, name, value)
        if "num_labels" in vars(own):  # many models keep a copy outside their configuration, for the loss
            own.num_labels = config.num_labels
        with torch.device("meta"):
            blank = auto_class.from_config(config)
        head = [n for n, p in own.named_parameters() if n in missing and p.shape != blank.get_parameter(n).shape]
        for name in dict.fromkeys(n.rpartition(".")[0] for n in head):
            own.set_submodule(name, blank.get_submodule(name).to_empty(device=model.device))
        return with_head(Weights(own, missing, origin), config)
